"""Packing and the stream, on documents whose tokens say where they come from: token = 1000 * document + place in it."""

import json
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ConfigError
from data.loader import IGNORE, build_loader, heldout_rows
from data.prepare import prepare
from data.shards import Corpus
from data.stream import Position, Progress, TokenStream
from tests.data.conftest import make_texts

lengths_of = st.lists(st.integers(2, 40), min_size=1, max_size=12)
corpora_of = lengths_of.map(lambda lengths: lengths if sum(lengths) >= 50 else [*lengths, 50])  # they fill the longest row
groups_of = st.sampled_from([1, 20, 60, 150, 2**26])  # tokens of a group: many groups to an epoch, or one
QUICK = settings(max_examples=60, deadline=None)


class Table:
    """A split in memory."""

    def __init__(self, name, lengths, sources=None):
        self.name, self.lengths, self.num_documents = name, np.array(lengths, np.int64), len(lengths)
        self.num_tokens = sum(lengths)
        self.sources, self.source_numbers = ["a", "b", "c"], np.array(sources or [0] * len(lengths), np.int64)

    def tokens(self, document, start=0, stop=None):
        return np.arange(int(self.lengths[document]), dtype=np.uint32)[start:stop] + 1000 * document


class Memory(Corpus):
    """A corpus in memory."""

    fingerprint = 7
    folder = "memory"

    def __init__(self, lengths, sources=None):
        self._splits = {name: Table(name, lengths, sources) for name in ("train", "heldout")}


@contextmanager
def groups(tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.stream.SHUFFLE_TOKENS", tokens)
        yield


def loader_of(lengths, seq_len, rows=1, **arguments):
    return build_loader(Memory(lengths), seq_len=seq_len, rows_per_step=rows, **{"micro_batch_rows": 1} | arguments)


def rows_of(batches):
    """(tokens, labels) of each row as lists."""
    return [(row.tolist(), label.tolist()) for batch in batches for row, label in zip(batch.tokens, batch.labels, strict=True)]


def union(lengths, world_size, seq_len, rows_per_step, micro, steps, seed=3):
    """Rows of each step over all ranks, in global order."""
    loaders = [
        build_loader(
            Memory(lengths), seq_len=seq_len, rows_per_step=rows_per_step, micro_batch_rows=micro, rank=r, world_size=world_size, seed=seed
        )
        for r in range(world_size)
    ]
    found = []
    for _ in range(steps):
        parts = [loader.next_step() for loader in loaders]
        assert len({len(part) for part in parts}) == 1
        assert {batch.step_targets for part in parts for batch in part} == {sum(batch.num_targets for part in parts for batch in part)}
        for m in range(rows_per_step // micro):
            found += rows_of([parts[m % world_size][m // world_size]])
    assert len({str(loader.state_dict()) for loader in loaders}) == 1
    return found


def visited(loader):
    """Progress in the one pool of a run without a mix."""
    (place,) = loader.progress
    return place.visited


def check_each_once(lengths, rows, loader):
    """`rows` and what is left of the loader's group are the stream's beginning, each token as often as there, with its true label."""
    rows = list(rows)
    while visited(loader).views or visited(loader).start.epoch < 1:
        rows += rows_of(loader.next_step())
    start, stream = visited(loader).start, TokenStream(np.array(lengths), seed=loader.state_dict()["seed"])
    begun = stream.pieces([(Position(start.epoch, 0), start.offset)])
    expected = Counter(1000 * piece.document + i for piece in begun for i in range(piece.start, piece.stop))
    expected.update({1000 * document + i: start.epoch for document, length in enumerate(lengths) for i in range(length)})
    assert loader.epochs()["*"] == sum(len(tokens) for tokens, _ in rows) / sum(lengths)
    assert Counter(token for tokens, _ in rows for token in tokens) == expected
    for token, label in (pair for tokens, labels in rows for pair in zip(tokens, labels, strict=True)):
        document, place = divmod(token, 1000)
        assert label == (token + 1 if place + 1 < lengths[document] else IGNORE)


@QUICK
@given(
    lengths=corpora_of,
    seq_len=st.integers(1, 50),
    micro=st.integers(1, 3),
    seed=st.integers(0, 2**63),
    group=groups_of,
    epochs=st.integers(1, 3),
)
def test_every_token_and_every_transition_once_an_epoch(lengths, seq_len, micro, seed, group, epochs):
    with groups(group):
        loader, rows = loader_of(lengths, seq_len, rows=2 * micro, micro_batch_rows=micro, seed=seed), []
        while visited(loader).start.epoch < epochs:
            for batch in loader.next_step():
                assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (micro, seq_len)
                rows += rows_of([batch])
        check_each_once(lengths, rows, loader_of(lengths, seq_len, seed=seed, state=loader.state_dict()))


@QUICK
@given(lengths=corpora_of, seq_len=st.integers(1, 50), micro=st.integers(1, 3), before=st.integers(1, 9))
def test_pieces_are_what_cu_seqlens_says(lengths, seq_len, micro, before):
    first = loader_of(lengths, before)  # rows after a change of length have pieces from several places
    for _ in range(4):
        first.next_step()
    loader = loader_of(lengths, seq_len, rows=micro, micro_batch_rows=micro, state=first.state_dict())
    for _ in range(3):
        (batch,) = loader.next_step()
        cuts = batch.cu_seqlens.tolist()
        assert batch.cu_seqlens.dtype == torch.int32 and batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
        assert cuts[0] == 0 and cuts[-1] == micro * seq_len and all(a < b for a, b in pairwise(cuts))
        assert set(range(0, micro * seq_len + 1, seq_len)) <= set(cuts)
        assert batch.max_length == max(b - a for a, b in pairwise(cuts))
        assert len(batch.documents) == len(cuts) - 1
        tokens, positions = batch.tokens.flatten().tolist(), batch.positions.flatten().tolist()
        for origin, a, b in zip(batch.documents, cuts, cuts[1:], strict=False):
            assert positions[a:b] == list(range(b - a))
            assert tokens[a:b] == [1000 * origin.document + origin.start + i for i in range(b - a)]
            assert origin.row == a // seq_len == (b - 1) // seq_len
        assert batch.num_targets == (batch.labels != IGNORE).sum()


@QUICK
@given(lengths=corpora_of, seq_len=st.integers(1, 30), micro=st.integers(1, 2), steps=st.integers(1, 4), group=groups_of)
def test_rows_do_not_depend_on_the_number_of_ranks(lengths, seq_len, micro, steps, group):
    rows_per_step = 4 * micro
    with groups(group):
        one = union(lengths, 1, seq_len, rows_per_step, micro, steps)
        assert one == union(lengths, 2, seq_len, rows_per_step, micro, steps) == union(lengths, 4, seq_len, rows_per_step, micro, steps)
        assert one == union(lengths, 1, seq_len, rows_per_step, 1, steps)


@QUICK
@given(lengths=corpora_of, plan=st.lists(st.sampled_from([1, 3, 8, 8, 8, 30]), min_size=1, max_size=8), data=st.data(), group=groups_of)
def test_resume_at_any_step_is_exact(lengths, plan, data, group):
    def run(seq_lens, state):
        """Each step's rows and the state after it; as in training, a loader lives while the row length stays."""
        found, loader = [], None
        for seq_len in seq_lens:
            if loader is None or loader.seq_len != seq_len:
                loader = loader_of(lengths, seq_len, rows=2, seed=5, state=state)
            found.append((rows_of(loader.next_step()), state := loader.state_dict()))
        return found

    with groups(group):
        stop = data.draw(st.integers(1, len(plan)))
        unbroken, first = run(plan, None), run(plan[:stop], None)
        saved = json.loads(json.dumps(first[-1][1]))
        assert saved == first[-1][1]
        assert first + run(plan[stop:], saved) == unbroken


@QUICK
@given(
    lengths=corpora_of,
    changes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2])), min_size=1, max_size=6),
    group=groups_of,
    seed=st.integers(0, 9),
)
def test_a_change_of_length_batch_or_ranks_repeats_and_skips_nothing(lengths, changes, group, seed):
    state, rows = None, []
    with groups(group):
        for seq_len, micro, steps, world_size in changes:
            arguments = {"rows": 2 * micro, "micro_batch_rows": micro, "world_size": world_size, "seed": seed, "state": state}
            loaders = [loader_of(lengths, seq_len, rank=r, **arguments) for r in range(world_size)]
            for _ in range(steps):
                batches = [batch for loader in loaders for batch in loader.next_step()]
                assert {batch.step_targets for batch in batches} == {sum(batch.num_targets for batch in batches)}
                rows += rows_of(batches)
            state = loaders[-1].state_dict()
        check_each_once(lengths, rows, loader_of(lengths, changes[-1][0], seed=seed, state=state))


def test_the_rows_of_a_step_come_from_different_places():
    lengths = [900] + [3] * 20  # the long document fills 7 steps of 8 rows
    loader, starts = loader_of(lengths, 16, rows=8), []
    for _ in range(6):
        places = [tokens[0] for tokens, _ in rows_of(loader.next_step()) if tokens[0] < 900]
        assert max(places) - min(places) > 450
        starts.append(places)
    neighbours = sum(b - a == 16 for places in starts for a, b in pairwise(places))
    assert neighbours <= 2


def test_a_length_under_which_no_row_was_visited_leaves_no_trace():
    first = loader_of([50, 60], 8)
    first.next_step()
    state = first.state_dict()
    assert state["pools"]["*"]["views"] == [[8, 1, "concat"]]
    passing = loader_of([50, 60], 5, state=state)
    assert passing.state_dict() == state
    back = loader_of([50, 60], 8, state=passing.state_dict())
    assert [rows_of(back.next_step()) for _ in range(20)] == [rows_of(first.next_step()) for _ in range(20)]


def test_a_finished_group_is_the_beginning_of_the_next():
    loader = loader_of([40, 60], 8)
    for _ in range(13):  # 104 tokens: the last row runs on into the next epoch
        loader.next_step()
    assert visited(loader) == Progress(Position(1, 4), ())


def test_no_group_at_the_end_of_an_epoch_is_shorter_than_the_others():
    stream, progress, starts = TokenStream(np.full(10, 11), seed=0), Progress(Position()), []
    with groups(50):
        while progress.start.epoch == 0:
            starts.append(progress.start.offset)
            _, progress = stream.take(progress, 1, 5)
    assert sorted(set(starts)) == [0, 50]  # 50 and 60 tokens, not 50, 50 and 10


def mix(x):
    """splitmix64 in plain integers. A saved run depends on the order: it may not change with a library or a refactoring."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def shuffled(items, *key):
    state = 0
    for number in key:
        state = mix((state + number) % 2**64)
    return [items[i] for i in sorted(range(len(items)), key=lambda i: mix((state + i) % 2**64))]


def reference(epoch_tokens, seed, seq_lens, group):
    """The order of rows, token by token: for a row of each of `seq_lens`, the numbers of its tokens in the endless stream."""
    end, views, rows = 0, 0, []
    for before, seq_len in pairwise([None, *seq_lens]):
        if not rows:
            start, views = end, -1
            left = epoch_tokens - start % epoch_tokens
            end += left if left < 2 * group else group
            tokens = list(range(start, end))
        if rows and seq_len != before:
            tokens = sorted(token for row in rows for token in row)
        if not rows or seq_len != before:
            views += 1
            missing = -len(tokens) % seq_len
            tokens += range(end, end + missing)
            end += missing
            cut = [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)]
            rows = shuffled(cut, seed, *divmod(start, epoch_tokens), views, seq_len)
        yield rows.pop(0)


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths_of,
    changes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=6),
    group=groups_of,
    seed=st.integers(0, 2**63),
)
def test_rows_are_those_of_the_reference(lengths, changes, group, seed):
    stream, progress, total = TokenStream(np.array(lengths), seed=seed), Progress(Position()), sum(lengths)
    seq_lens = [seq_len for seq_len, count in changes for _ in range(count)]
    with groups(group):
        expected = list(reference(total, seed, seq_lens, group))
        for seq_len, count in changes:
            rows, progress = stream.take(progress, count, seq_len)
            for row in rows:
                places = [position.epoch * total + position.offset for position, _ in row]
                assert [place + i for place, (_, n) in zip(places, row, strict=True) for i in range(n)] == expected.pop(0)
                assert all(a + n < b for a, b, (_, n) in zip(places, places[1:], row, strict=False))  # joined where they meet
                pieces = stream.pieces(row)
                found = [(piece.document, i) for piece in pieces for i in range(piece.start, piece.stop)]
                assert found == [token for at, n in row for token in tokens_after(lengths, seed, at, n)]
                assert stream.num_document_ends([row]) == sum(place == lengths[document] - 1 for document, place in found)


def tokens_after(lengths, seed, position, count):
    found, epoch = [], position.epoch
    while len(found) < position.offset + count:
        found += [(d, i) for d in shuffled(range(len(lengths)), seed, epoch) for i in range(lengths[d])]
        epoch += 1
    return found[position.offset : position.offset + count]


def test_the_order_of_rows_is_pinned_and_differs_by_seed_and_epoch_and_group():
    def order(seed, start):
        rows, _ = TokenStream(np.full(20, 10), seed=seed).take(Progress(start), 20, 5)
        return tuple(row[0][0].offset // 5 for row in rows)

    assert order(0, Position()) == (23, 0, 36, 21, 12, 13, 33, 7, 30, 28, 22, 11, 24, 29, 5, 27, 8, 2, 9, 1)
    places = [Position(epoch, offset) for epoch in range(3) for offset in (0, 5)]
    assert len({order(seed, place) for seed in range(4) for place in places}) == 24


def test_the_order_of_documents_is_pinned_and_differs_by_seed_and_epoch():
    def order(seed, epoch):
        return [piece.document for piece in TokenStream(np.full(50, 2), seed=seed).pieces([(Position(epoch, 0), 100)])]

    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    for seed, epoch in ((0, 0), (1, 0), (2**63, 5)):
        assert order(seed, epoch) == shuffled(range(50), seed, epoch)
    assert order(0, 0)[:6] == [18, 4, 31, 39, 42, 8]


@QUICK
@given(lengths=lengths_of, seq_len=st.integers(1, 30), rows=st.integers(1, 40), micro=st.integers(1, 2))
def test_heldout_rows_are_fixed_and_each_scored_once(lengths, seq_len, rows, micro):
    corpus = Memory(lengths)
    if sum(lengths) < seq_len:
        with pytest.raises(ConfigError, match=f"seq_len={seq_len}.*{sum(lengths)} tokens"):
            heldout_rows(corpus, seq_len=seq_len, rows=rows)
        return
    one = heldout_rows(corpus, seq_len=seq_len, rows=rows)
    count = min(rows, sum(lengths) // seq_len)
    assert len(one) == count and sum(batch.num_targets for batch in one) == one[0].step_targets
    tokens = torch.cat([batch.tokens.flatten() for batch in one])
    assert len(tokens.unique()) == len(tokens)
    for world_size in (2, 3):
        parts = [
            heldout_rows(corpus, seq_len=seq_len, rows=rows, micro_batch_rows=micro, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        assert len({len(part) for part in parts}) == 1
        batches = [parts[m % world_size][m // world_size] for m in range(world_size * len(parts[0]))]
        assert rows_of(batches)[:count] == rows_of(one)
        assert all(set(labels) == {IGNORE} for _, labels in rows_of(batches)[count:])
        assert {batch.step_targets for batch in batches} == {one[0].step_targets}


def test_heldout_rows_mix_documents():
    rows = rows_of(heldout_rows(Memory([500] * 8), seq_len=10, rows=20))
    assert len({tokens[0] // 1000 for tokens, _ in rows}) >= 6


def test_numbers_that_do_not_fit_are_refused():
    corpus = Memory([5, 6])
    with pytest.raises(ConfigError, match="seq_len=12: the documents of the train split have 11 tokens and fill no row"):
        build_loader(corpus, seq_len=12, rows_per_step=1, micro_batch_rows=1)
    with pytest.raises(ConfigError, match=r"rows_per_step=6: .* 2 \* 2"):
        build_loader(corpus, seq_len=4, rows_per_step=6, micro_batch_rows=2, world_size=2)
    with pytest.raises(ConfigError, match="seq_len=0"):
        build_loader(corpus, seq_len=0, rows_per_step=1, micro_batch_rows=1)
    with pytest.raises(ConfigError, match="train split holds no documents"):
        build_loader(Memory([]), seq_len=4, rows_per_step=1, micro_batch_rows=1)
    state = build_loader(corpus, seq_len=4, rows_per_step=1, micro_batch_rows=1).state_dict()
    for key in ("seed", "corpus"):
        with pytest.raises(ConfigError, match=f"{key}=99, this run has {key}="):
            build_loader(corpus, seq_len=4, rows_per_step=1, micro_batch_rows=1, state=state | {key: 99})


def test_from_a_prepared_folder_to_a_batch(jsonl_config):
    config = jsonl_config(make_texts(30))
    prepare(config)
    corpus = Corpus.open(config.prepared_dir)
    loader = build_loader(config.prepared_dir, seq_len=64, rows_per_step=4, micro_batch_rows=2)
    table = corpus.split("train")
    for batch in loader.next_step():
        flat = batch.tokens.flatten().numpy()
        for origin, a, b in zip(batch.documents, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            assert (flat[a:b] == table.tokens(origin.document, origin.start, origin.start + int(b - a))).all()
        moved = batch.to("meta")
        assert {moved.tokens.device.type, moved.labels.device.type, moved.positions.device.type} == {"meta"}
        assert moved.cu_seqlens.device.type == "cpu" and moved.max_length == batch.max_length
    heldout = heldout_rows(corpus, seq_len=64, rows=2)
    assert len(heldout) == 2
