"""Mixes: whatever the corpus, the stages, the ranks and the kills, each pool's documents come once an epoch and in their shares."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.mapping import from_mapping
from configs.schema import ConfigError, LengthBucketConfig, MixConfig, MixSourceConfig, Packing
from data.loader import IGNORE, PADDING, build_loader
from data.mix import LONG, partition, report, shares
from tests.data.test_loader import QUICK, Memory, groups, groups_of, rows_of

A, B, C = (MixSourceConfig(name=name) for name in "abc")


def weighted(**weights):
    return MixConfig(sources=tuple(MixSourceConfig(name=name, weight=weight) for name, weight in weights.items()))


# Every source holds documents of at most 9, of 10 to 24, and of 25 tokens and more, of which any row of these tests is filled.
BASE = [(source, length) for source in range(3) for length in (9, 9, 9, 24, 20, 40)]
MIXES = (
    MixConfig(),
    weighted(a=0.7, c=0.3),
    MixConfig(sources=(A, B), temperature=2.0),
    MixConfig(sources=tuple(MixSourceConfig(name=name, epochs=epochs) for name, epochs in (("a", 1.0), ("b", 3.5)))),
    MixConfig(min_document_tokens=10),
    MixConfig(max_document_tokens=24),
    MixConfig(buckets=(LengthBucketConfig(min_tokens=10, repeat=2.0), LengthBucketConfig(min_tokens=25, repeat=5.0))),
)
corpora_of = st.lists(st.tuples(st.integers(0, 2), st.integers(2, 60)), max_size=20).map(lambda more: [*BASE, *more])
stages_of = st.lists(
    st.tuples(st.integers(1, 20), st.sampled_from(MIXES), st.sampled_from(Packing), st.integers(1, 4)), min_size=1, max_size=4
)


def corpus_of(documents):
    return Memory([length for _, length in documents], [source for source, _ in documents])


class Run:
    """A run of stages (seq_len, mix, packing, steps) of four rows a step."""

    def __init__(self, documents, stages, seed=0):
        self.corpus, self.seed = corpus_of(documents), seed
        self.stages = [(seq_len, replace(mix, packing=packing), steps) for seq_len, mix, packing, steps in stages]
        self.mixes = [mix for _, mix, _ in self.stages]
        self.where = [stage for stage in self.stages for _ in range(stage[2])]  # of each step

    def loaders(self, seq_len, mix, state, world_size=1):
        arguments = {"seq_len": seq_len, "rows_per_step": 4, "micro_batch_rows": 1, "world_size": world_size, "seed": self.seed}
        return [build_loader(self.corpus, mix=mix, run_mixes=self.mixes, state=state, rank=rank, **arguments) for rank in range(world_size)]

    def rows(self, first, last, state, world_size=1):
        """The rows of steps [first, last), in global order, and the state after them; a loader lives as long as its stage."""
        found, stage = [], None
        for step in range(first, last):
            if self.where[step] is not stage:
                stage = self.where[step]
                loaders = self.loaders(*stage[:2], state, world_size)
            parts = [loader.next_step() for loader in loaders]
            assert {batch.step_targets for part in parts for batch in part} == {sum(b.num_targets for part in parts for b in part)}
            found += rows_of(parts[m % world_size][m // world_size] for m in range(4))
            states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
            assert all(other == states[0] for other in states)
            state = states[0]
        return found, state


@settings(max_examples=100, deadline=None)
@given(documents=corpora_of, stages=stages_of, group=groups_of, seed=st.integers(0, 2**63 - 1), data=st.data())
def test_any_ranks_and_any_kills_deliver_the_rows_of_the_unbroken_run(documents, stages, group, seed, data):
    run = Run(documents, stages, seed)
    with groups(group):
        unbroken, end = run.rows(0, len(run.where), None)
        found, state, at = [], None, 0
        for stop in sorted(data.draw(st.sets(st.integers(1, len(run.where)), max_size=3)) | {len(run.where)}):
            more, state = run.rows(at, stop, state, world_size=data.draw(st.sampled_from([1, 2, 4])))
            found, at = found + more, stop
        assert found == unbroken and state == end


@settings(max_examples=100, deadline=None)
@given(documents=corpora_of, stages=stages_of, group=groups_of, seed=st.integers(0, 9))
def test_every_token_of_a_pool_comes_once_an_epoch_whatever_the_mixes_were(documents, stages, group, seed):
    """After any stages, what is left of each pool's group is drawn; then a pool's tokens came as often as its epochs say."""
    run = Run(documents, stages, seed)
    table = run.corpus.split("train")
    with groups(group):
        rows, state = run.rows(0, len(run.where), None)
        pools = partition(table, run.mixes)
        seq_len, mix, _ = run.stages[-1]
        (loader,) = run.loaders(seq_len, mix, state)
        ends = []
        for number, place in enumerate(loader.progress):  # every pool alone: its group is drawn to the end
            stream, progress = loader._stream._streams[number], place.visited
            while progress.views:
                taken, progress = stream.take(progress, 1, seq_len, mix.packing)
                for row in taken:
                    pieces = loader._stream.pieces(number, row)
                    rows.append(([1000 * p.document + i for p in pieces for i in range(p.start, p.stop)], []))
            ends.append(progress.start)
    delivered = Counter(token for tokens, labels in rows for token in real(tokens, labels))
    for pool, end in zip(pools, ends, strict=True):
        counts = [delivered[1000 * document + i] for document in pool.documents.tolist() for i in range(table.lengths[document])]
        assert set(counts) <= {end.epoch, end.epoch + 1} and sum(count == end.epoch + 1 for count in counts) == end.offset


def real(tokens, labels):
    """Tokens of a row without its padding, which is 0 without a label at its end; document 0 begins with a 0 that has one."""
    tokens = list(tokens)
    while labels and tokens and tokens[-1] == 0 and labels[len(tokens) - 1] == IGNORE:
        tokens.pop()
    return tokens


@QUICK
@given(documents=corpora_of, seq_len=st.integers(1, 20), mix=st.sampled_from(MIXES), packing=st.sampled_from(Packing))
def test_what_a_batch_says_of_its_rows(documents, seq_len, mix, packing):
    """Tokens, labels, positions, cu_seqlens, padding, and the counts of sources and lengths, piece by piece."""
    (loader,) = Run(documents, [(seq_len, mix, packing, 1)]).loaders(seq_len, replace(mix, packing=packing), None)
    for _ in range(5):
        batches, counts, padding = loader.next_step(), Counter(), 0
        for batch in batches:
            bounds = batch.cu_seqlens.tolist()
            assert bounds[0] == 0 and bounds[-1] == seq_len and len(batch.documents) == len(bounds) - 1
            assert batch.max_length == max(np.diff(bounds)) and batch.cu_seqlens.dtype == torch.int32
            tokens, labels, positions = (tensor.flatten().tolist() for tensor in (batch.tokens, batch.labels, batch.positions))
            for origin, low, high in zip(batch.documents, bounds, bounds[1:], strict=False):
                assert positions[low:high] == list(range(high - low))
                if origin.document == PADDING:
                    assert high == seq_len and set(tokens[low:high]) == {0} and set(labels[low:high]) == {IGNORE}
                    padding += high - low
                    continue
                source, length = documents[origin.document]
                assert tokens[low:high] == [1000 * origin.document + origin.start + i for i in range(high - low)]
                ends = origin.start + high - low == length
                assert labels[low:high] == [token + 1 for token in tokens[low : high - ends]] + [IGNORE] * ends
                counts[f"source/{'abc'[source]}"] += high - low
                counts["length/0"] += high - low
            if packing is Packing.SEPARATE:
                assert sum(origin.document != PADDING for origin in batch.documents) == 1
        found = loader.count(batches)
        assert {key: value for key, value in found.items() if value and key != "padding"} == counts and found["padding"] == padding
        assert packing is not Packing.CONCAT or not padding
        assert sum(found.values()) == 4 * seq_len + counts["length/0"]  # each token by its source and by its length


def test_documents_are_counted_by_their_whole_length():
    documents = [(0, 8191), (1, 8192), (2, 32768), (0, 131072)]
    (loader,) = Run(documents, [(64, MixConfig(), Packing.CONCAT, 1)]).loaders(64, MixConfig(), None)
    counts = Counter()
    for _ in range(sum(length for _, length in documents) // 256):
        counts.update(loader.count(loader.next_step()))
    assert [counts[f"length/{low}"] for low in (0, *LONG)] == pytest.approx([8191, 8192, 32768, 131072], abs=256)


@QUICK
@given(documents=corpora_of, weights=st.lists(st.integers(1, 20), min_size=3, max_size=3), packing=st.sampled_from(Packing))
def test_no_source_is_a_row_ahead_of_its_share_nor_two_behind(documents, weights, packing):
    mix = replace(weighted(**{name: weight / sum(weights) for name, weight in zip("abc", weights, strict=True)}), packing=packing)
    (loader,) = Run(documents, [(20, mix, packing, 1)]).loaders(20, mix, None)
    counts = Counter()
    for _ in range(30):
        counts.update({key: n for key, n in loader.count(loader.next_step()).items() if key.startswith("source/")})
        for name, weight in zip("abc", weights, strict=True):
            ahead = counts[f"source/{name}"] - weight / sum(weights) * counts.total()
            assert -40 <= ahead <= 20


def by_hand(documents, mix):
    """Share of each document's every token in the training tokens, from the definition; None for those left out."""
    names = {source.name: source for source in mix.sources}
    size = {}
    for document, (source, length) in enumerate(documents):
        taken = (not names or "abc"[source] in names) and length >= mix.min_document_tokens
        if taken and length <= (mix.max_document_tokens or length):
            repeat = [1.0, *(bucket.repeat for bucket in mix.buckets if bucket.min_tokens <= length)][-1]
            size[document] = length * Fraction(repeat)
    sums = {source: sum(part for document, part in size.items() if documents[document][0] == source) for source in range(3)}
    wanted = {}
    for source, total in sums.items():
        given = names.get("abc"[source])
        if given and given.weight:
            wanted[source] = given.weight
        elif given and given.epochs:
            wanted[source] = given.epochs * float(total)
        else:
            wanted[source] = float(total) ** (1 / mix.temperature)
    return {document: wanted[s := documents[document][0]] / sum(wanted.values()) * float(part / sums[s]) for document, part in size.items()}


@QUICK
@given(documents=corpora_of, mix=st.sampled_from(MIXES), others=st.lists(st.sampled_from(MIXES), max_size=3))
def test_shares_are_those_of_the_definition_whatever_other_stages_tell_apart(documents, mix, others):
    table = corpus_of(documents).split("train")
    pools = partition(table, [*others, mix])
    assert sorted(np.concatenate([pool.documents for pool in pools]).tolist()) == list(range(len(documents)))
    expected = by_hand(documents, mix)
    for pool, share in zip(pools, shares(pools, mix, table), strict=True):
        assert share / 2**32 == pytest.approx(sum(expected.get(document, 0.0) for document in pool.documents.tolist()), abs=1e-8)


def test_a_report_says_what_training_then_sees():
    documents = [(0, 300)] * 200 + [(0, 9000)] * 20 + [(1, 40000)] * 4 + [(2, 140000)] + [(2, 1000)] * 30
    corpus, steps = corpus_of(documents), 400
    buckets = (LengthBucketConfig(min_tokens=8192, repeat=3.0),)
    for packing in (Packing.CONCAT, Packing.SEPARATE):
        mix = replace(weighted(a=0.5, b=0.3, c=0.2), buckets=buckets, packing=packing)
        found = report(corpus.split("train"), mix, tokens=steps * 4 * 1024, seq_len=1024)
        loader, counts = build_loader(corpus, seq_len=1024, rows_per_step=4, micro_batch_rows=1, mix=mix), Counter()
        for _ in range(steps):
            counts.update(loader.count(loader.next_step()))
        real_tokens = steps * 4 * 1024 - counts["padding"]
        assert found.padding == pytest.approx(counts["padding"] / (steps * 4 * 1024), abs=0.01)
        for low in LONG:
            seen = sum(number for key, number in counts.items() if key.startswith("length/") and int(key[7:]) >= low)
            assert found.long[low] == pytest.approx(seen / real_tokens, abs=0.005)
        assert {pool.name: pool.epochs for pool in found.pools} == pytest.approx(loader.epochs(), rel=0.03)
        assert [pool.name for pool in found.pools] == ["a 0-8191", "a 8192-", "b 8192-", "c 0-8191", "c 8192-"]


def test_a_stream_saved_before_there_were_mixes_goes_on():
    corpus, arguments = corpus_of(BASE), {"seq_len": 7, "rows_per_step": 2, "micro_batch_rows": 1}
    whole = build_loader(corpus, **arguments)
    for _ in range(3):
        whole.next_step()
    old = {"epoch": 0, "offset": 0, "views": [[7, 6]], "seed": 0, "corpus": 7}
    resumed = build_loader(corpus, **arguments, state=old)
    assert resumed.state_dict() == whole.state_dict() and resumed.epochs() == {"*": 42 / sum(length for _, length in BASE)}
    for _ in range(60):
        assert rows_of(resumed.next_step()) == rows_of(whole.next_step())
    with pytest.raises(ConfigError, match=r"^resume: the saved stream has documents in pools \*, the mixes of this run make a, b, c; "):
        build_loader(corpus, **arguments, mix=weighted(a=0.5, b=0.5), state=old)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (weighted(a=0.5, d=0.5), r"^mix.sources.1.name=d: no such source; the corpus has a, b, c$"),
        (MixConfig(sources=(A, C), min_document_tokens=41), r"^mix.sources.0.name=a: it has no document of at least 41 tokens$"),
        (MixConfig(min_document_tokens=41), r"^mix.min_document_tokens=41: no document is left; they have 9 to 40 tokens$"),
        (MixConfig(max_document_tokens=8), r"^mix.max_document_tokens=8: no document is left; they have 9 to 40 tokens$"),
        (
            MixConfig(buckets=(LengthBucketConfig(min_tokens=41, repeat=2),)),
            r"^mix.buckets.0.min_tokens=41: the bucket holds nothing: no document has as many tokens, the longest has 40$",
        ),
        (
            MixConfig(buckets=(LengthBucketConfig(min_tokens=10), LengthBucketConfig(min_tokens=11), LengthBucketConfig(min_tokens=12))),
            r"^mix.buckets.0.min_tokens=10: the bucket holds nothing: no document has as many tokens and fewer than 11, the longest",
        ),
        (MixConfig(min_document_tokens=25), r"^seq_len=128: the documents of the train split of 25 tokens and more have 120 tokens"),
        (weighted(b=1.0), r"^seq_len=128: the documents of b have 111 tokens and fill no row; "),
    ],
)
def test_a_mix_that_the_corpus_does_not_have_is_refused(mix, message):
    with pytest.raises(ConfigError, match=message):
        build_loader(corpus_of(BASE), seq_len=128, rows_per_step=1, micro_batch_rows=1, mix=mix)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"sources": [{"name": "a", "weight": 0.3}, {"name": "b", "weight": 0.9}]},
            r"sum to 1.2: must sum to 1; in these proportions 0.25, 0.75",
        ),
        ({"sources": [{"name": "a", "weight": -0.3}]}, r"^mix.sources.0.weight=-0.3: must be at least 0"),
        ({"sources": [{"name": "a", "weight": 1}, {"name": "b"}]}, r"^mix.sources.1.weight=0.0: must be positive"),
        ({"sources": [{"name": "a", "weight": 1, "epochs": 2}]}, r"^mix.sources=weight and epochs: give a mix one of them"),
        ({"sources": [{"name": "a"}, {"name": "a"}]}, r"names must be unique"),
        ({"sources": [{"name": ""}]}, r"^mix.sources.0.name='': must not be empty"),
        ({"sources": [{"name": "a", "epochs": 1}], "temperature": 2}, r"^mix.temperature=2.0: sources have epochs; leave it out"),
        ({"temperature": 0}, r"^mix.temperature=0.0: must be positive"),
        ({"min_document_tokens": 9, "max_document_tokens": 8}, r"^mix.max_document_tokens=8: must be at least min_document_tokens=9, or 0"),
        ({"buckets": [{"min_tokens": 9}, {"min_tokens": 9}]}, r"^mix.buckets.1.min_tokens=9: must be greater than 9"),
        ({"buckets": [{"min_tokens": 9}], "max_document_tokens": 8}, r"^mix.buckets.0.min_tokens=9: holds nothing: max_document_tokens=8"),
        ({"buckets": [{"min_tokens": 9, "repeat": 0}]}, r"^mix.buckets.0.repeat=0.0: must be positive"),
        ({"packing": "best"}, r"^mix.packing='best': no such choice.*; accepted: concat, best_fit, separate"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        from_mapping(MixConfig, values, "mix.")
    assert "\n" not in str(caught.value)
