"""Corpora that are read as a run trains on them: killed anywhere, failing anywhere, each rank's documents come in order, once a pass."""

import contextlib
import errno
import json
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.documents
import data.reading
from configs.checks import check_run
from configs.mapping import from_mapping, to_mapping
from configs.schema import (
    ConfigError,
    DataConfig,
    MixConfig,
    MixSourceConfig,
    Packing,
    RunConfig,
    SourceConfig,
    SourceFormat,
    StageConfig,
    TokenizerConfig,
    TokenizerKind,
)
from data.documents import LeftOut, Outage, Share, read_documents
from data.loader import IGNORE, PADDING, build_loader, heldout_rows, open_corpus
from data.prepare import is_heldout, text_digest
from data.reading import Place, ReadAhead, read
from data.tokenizer import load_tokenizer
from tests.data.conftest import make_texts, write_jsonl
from tests.data.test_documents import hub  # noqa: F401 (a fixture)
from tests.data.test_loader import rows_of

ROOT = Path(__file__).parents[2]
HELDOUT = 0.2


@contextlib.contextmanager
def inline(group=1000):
    """Groups of so many tokens; what a process of its own would read is read in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.streaming.SHUFFLE_TOKENS", group)
        patch.setattr("data.streaming.ReadAhead", read)
        yield


def config_of(model_file, *sources, **changes) -> DataConfig:
    tokenizer = TokenizerConfig(kind=TokenizerKind.SENTENCEPIECE, path=str(model_file))
    given = {"streaming": True, "num_workers": 1, "heldout_fraction": HELDOUT, "tokenizer": tokenizer, "sources": sources}
    return DataConfig(**given | changes)


def source_of(folder, fmt=SourceFormat.JSONL, name="lines", **fields) -> SourceConfig:
    return SourceConfig(name=name, format=fmt, path=str(folder), **fields)


def write(folder: Path, fmt: SourceFormat, files: list[list[str]]) -> None:
    """`files` of texts; text has a file for each."""
    folder.mkdir()
    if fmt is SourceFormat.TEXT:
        for number, text in enumerate(text for texts in files for text in texts):
            (folder / f"{number:03d}.txt").write_text(text)
    for number, texts in enumerate(files if fmt is not SourceFormat.TEXT else ()):
        if fmt is SourceFormat.JSONL:
            write_jsonl(folder / f"{number}.jsonl", texts)
        else:
            pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet", row_group_size=3)


class World:
    """The ranks of a run over `config`, as processes that start anew: `state` is all they have of one another."""

    def __init__(self, config, world_size=1, **stage):
        # Each rank has a copy of the corpus of its own, as when rank 0 sends it.
        self.corpora = [open_corpus(config, heldout_tokens=0) for _ in range(world_size)]
        self.enter(**stage)

    def enter(self, seq_len=64, mix=None, seed=0, state=None):
        """Begins a stage."""
        self.seq_len, world_size = seq_len, len(self.corpora)
        shape = {"seq_len": seq_len, "rows_per_step": 2 * world_size, "micro_batch_rows": 1, "world_size": world_size}
        self.loaders = [
            build_loader(corpus, rank=rank, seed=seed, mix=mix, state=state, **shape) for rank, corpus in enumerate(self.corpora)
        ]

    def step(self):
        """The rows of each rank, with the stretches of documents that they hold."""
        found = []
        for rank, loader in enumerate(self.loaders):
            batches = loader.next_step()
            counted, padding = loader.count(batches), 0
            for batch in batches:
                assert batch.step_targets == sum(other.num_targets for other in batches)  # of this rank alone, see `gather`
                (row,), pieces = rows_of([batch]), []
                for origin, length in zip(batch.documents, batch.cu_seqlens.diff().tolist(), strict=True):
                    if origin.document == PADDING:
                        padding += length
                    else:
                        pieces.append((loader._table.label(origin.document), origin.start, length))
                found.append((rank, *row, *pieces))
            assert counted["padding"] == padding
            assert sum(n for key, n in counted.items() if key.startswith("source/")) + padding == len(batches) * self.seq_len
        return found

    def state(self):
        """Through JSON, as in a checkpoint."""
        states = [json.loads(json.dumps(loader.state_dict())) for loader in self.loaders]
        return states[0] | {"ranks": [state["ranks"][0] for state in states]}


formats = st.sampled_from([SourceFormat.JSONL, SourceFormat.PARQUET, SourceFormat.TEXT])
corpora = st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=8), min_size=1, max_size=3).filter(
    lambda files: sum(map(len, files)) > 9
)
TEXTS = make_texts(60, seed=3)


runs = st.fixed_dictionaries(
    {
        "files": corpora,
        "fmt": formats,
        "world_size": st.integers(1, 3),
        "stages": st.lists(st.tuples(st.integers(1, 60), st.sampled_from(Packing), st.integers(1, 4)), min_size=1, max_size=3),
        "group": st.sampled_from([1, 100, 1000]),
        "seed": st.integers(0, 2**63 - 1),
    }
)


@settings(max_examples=25, deadline=None)
@given(runs, st.data())
def test_any_kills_leave_the_rows_of_the_unbroken_run(tmp_path_factory, model_file, run, data):
    compare_with_unbroken(tmp_path_factory.mktemp("stream") / "files", model_file, data, st.just(1), **run)


@settings(max_examples=4, deadline=None)
@given(runs, st.data())
def test_so_do_any_numbers_of_tokenising_processes(tmp_path_factory, model_file, run, data):
    """Another number after each kill; a few characters are handed to a process at a time, so that all of them have some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.workers._CHUNK_CHARACTERS", 500)
        compare_with_unbroken(tmp_path_factory.mktemp("stream") / "files", model_file, data, st.integers(1, 3), **run)


def compare_with_unbroken(folder, model_file, data, workers, *, files, fmt, world_size, stages, group, seed):
    """A run of `stages` (row length, packing, steps), killed where `data` says and gone on with `workers`, beside one of one process."""
    write(folder, fmt, [[f"{number} {TEXTS[text]}" for number, text in enumerate(texts)] for texts in files])
    config = config_of(model_file, source_of(folder, fmt), heldout_fraction=0.0)
    where = [{"seq_len": seq_len, "mix": MixConfig(packing=packing)} for seq_len, packing, steps in stages for _ in range(steps)]

    def run(first, last, state, num_workers=1):
        """The rows of steps [first, last), and the state after them."""
        world, rows = World(replace(config, num_workers=num_workers), world_size, seed=seed, state=state, **where[first]), []
        for step in range(first, last):
            if step > first and where[step] != where[step - 1]:
                world.enter(seed=seed, state=world.state(), **where[step])
            rows += world.step()
        return rows, world.state()

    with inline(group):
        unbroken, end = run(0, len(where), None)
        found, state, at = [], None, 0
        for stop in sorted(data.draw(st.sets(st.integers(1, len(where)), max_size=3)) | {len(where)}):
            rows, state = run(at, stop, state, data.draw(workers))
            found, at = found + rows, stop
        assert found == unbroken and state == end


def training_documents(source, model_file, share, heldout_fraction):
    """Name and ids of the documents of a share, one pass, from the definition."""
    tokenizer = load_tokenizer(model_file)
    for document in read_documents(source, invalid_utf8=data.documents.InvalidText.SKIP, left_out=LeftOut(), share=share):
        if not is_heldout(text_digest(document.text), heldout_fraction):
            yield document.name, [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]


@settings(max_examples=20, deadline=None)
@given(
    files=corpora,
    fmt=formats,
    world_size=st.integers(1, 3),
    packing=st.sampled_from(Packing),
    stages=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4)), min_size=1, max_size=3),
    group=st.sampled_from([1, 100, 1000]),
)
def test_every_token_of_a_share_comes_once_a_pass(files, fmt, world_size, packing, stages, group, tmp_path_factory, model_file):
    """After any stages, what is left of each rank's group is drawn; then the tokens that came are the beginning of its documents."""
    folder = tmp_path_factory.mktemp("stream") / "files"
    write(folder, fmt, [[f"{number} {TEXTS[text]}" for number, text in enumerate(texts)] for texts in files])
    source, rows, world = source_of(folder, fmt), [], None
    with inline(group):
        for seq_len, steps in stages:
            stage = {"seq_len": seq_len, "mix": MixConfig(packing=packing)}
            if world is None:
                world = World(config_of(model_file, source, heldout_fraction=0.0), world_size, **stage)
            else:
                world.enter(state=world.state(), **stage)
            rows += [row for _ in range(steps) for row in world.step()]
        for rank, loader in enumerate(world.loaders):
            own = [row for row in rows if row[0] == rank]
            while loader.progress[0].visited.views:
                taken, loader.progress = loader._stream.take(loader.progress, 1)
                documents, (pieces,) = loader._stream.read(taken)
                own.append((rank, [], [], *((documents.label(piece.document), piece.start, piece.stop - piece.start) for piece in pieces)))
            expected, left = Counter(), loader.progress[0].visited.start.at
            share = list(training_documents(source, model_file, Share(rank, world_size), 0.0))
            while left > 0:
                for name, ids in share:
                    expected.update((name, place) for place in range(min(left, len(ids))))
                    left = max(0, left - len(ids))
            assert Counter((name, start + i) for _, _, _, *pieces in own for name, start, n in pieces for i in range(n)) == expected
            ids_of = dict(share)
            for _, tokens, labels, *pieces in own:
                for name, start, length in pieces if tokens else ():
                    ids = ids_of[name]
                    assert tokens[:length] == ids[start : start + length]
                    assert labels[:length] == [*ids[start + 1 : start + length + 1], IGNORE][:length]
                    tokens, labels = tokens[length:], labels[length:]
                assert set(tokens) <= {0} and set(labels) <= {IGNORE}


def test_fifty_kills_change_nothing(tmp_path, model_file):
    """Killed after any row between two checkpoints, and sometimes before the first."""
    write(tmp_path / "a", SourceFormat.JSONL, [make_texts(12, seed) for seed in range(3)])
    write(tmp_path / "b", SourceFormat.PARQUET, [make_texts(20, 7)])
    config = config_of(model_file, source_of(tmp_path / "a"), source_of(tmp_path / "b", SourceFormat.PARQUET, "table"))
    mix = MixConfig(
        sources=(MixSourceConfig(name="lines", weight=0.7), MixSourceConfig(name="table", weight=0.3)), packing=Packing.BEST_FIT
    )
    stage, steps, rng = {"seq_len": 64, "mix": mix, "seed": 5}, 120, random.Random(0)
    with inline(3000):
        world = World(config, 2, **stage)
        unbroken, passes = [world.step() for _ in range(steps)], world.loaders[0].epochs()
        found, saved, killed = [], None, 0
        while len(found) < steps:
            del found[saved["done"] if saved else 0 :]
            world = World(config, 2, state=saved and saved["state"], **stage)
            for _ in range(rng.randint(1, 4) if killed < 50 else steps):
                if len(found) < steps:
                    found.append(world.step())
                    if len(found) % 2 == 0:
                        saved = {"done": len(found), "state": world.state()}
            killed += 1
    assert killed > 50 and found == unbroken
    assert min(passes.values()) > 1 and world.loaders[0].epochs() == passes


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_data_set_of_the_hub_goes_on_from_any_step(hub, model_file, world_size):  # noqa: F811
    """As `datasets` streams and splits it; its own state goes through JSON."""
    config = config_of(model_file, source_of("owner/set", SourceFormat.HUB), heldout_fraction=0.0)
    with inline(200):
        world, found = World(config, world_size), []
        unbroken, state = [world.step() for _ in range(4)], None
        for _ in range(4):
            world = World(config, world_size, state=state)
            found.append(world.step())
            state = world.state()
        assert found == unbroken and any(place["place"]["reader"] for rank in state["ranks"] for place in rank.values())


PROGRAM = """
import json, pathlib, sys, zlib
from configs.mapping import from_mapping
from configs.schema import DataConfig
from data.loader import build_loader, open_corpus

import data.streaming
data.streaming.SHUFFLE_TOKENS = 20_000
config, out, steps = from_mapping(DataConfig, json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]), int(sys.argv[3])
done = json.loads(out.read_text()) if out.exists() else {"rows": [], "state": None}
loader = build_loader(open_corpus(config, heldout_tokens=0), seq_len=256, rows_per_step=4, micro_batch_rows=4, state=done["state"])
while len(done["rows"]) < steps:
    (batch,) = loader.next_step()
    done = {"rows": [*done["rows"], zlib.crc32(batch.tokens.numpy().tobytes())], "state": loader.state_dict()}
    out.with_suffix(".new").write_text(json.dumps(done))
    out.with_suffix(".new").replace(out)
"""


def test_a_program_killed_by_a_signal_goes_on_and_leaves_no_process(tmp_path, model_file):
    """Reading and tokenising in processes of their own, which end with it; resumed with another number of them."""
    write(tmp_path / "a", SourceFormat.JSONL, [[text * 3 for text in make_texts(100, seed)] for seed in range(2)])
    out, steps = tmp_path / "out.json", 120

    def start(path, workers):
        given = config_of(model_file, source_of(tmp_path / "a"), num_workers=workers)
        arguments = [json.dumps(to_mapping(given)), str(path), str(steps)]
        return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, start_new_session=True)

    with start(out, 2) as process:
        deadline = time.monotonic() + 60
        while not out.exists() or len(json.loads(out.read_text())["rows"]) < 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        began = children(process.pid)
        process.kill()
    done = len(json.loads(out.read_text())["rows"])
    assert 20 <= done < steps and len(began) >= 3  # who reads, and who tokenises
    while any(Path(f"/proc/{child}").exists() for child in began):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with start(out, 1) as process:
        assert process.wait() == 0
    with inline(20_000):
        corpus = open_corpus(config_of(model_file, source_of(tmp_path / "a")), heldout_tokens=0)
        loader = build_loader(corpus, seq_len=256, rows_per_step=4, micro_batch_rows=4)
        unbroken = [zlib.crc32(loader.next_step()[0].tokens.numpy().tobytes()) for _ in range(steps)]
        assert json.loads(out.read_text()) == {"rows": unbroken, "state": json.loads(json.dumps(loader.state_dict()))}


def children(process):
    """Processes that descend from `process`, itself left out."""
    own = [int(child) for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()]
    return own + [child for each in own for child in children(each)]


# --- sources that fail -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited."""
    waited = []
    monkeypatch.setattr(data.reading.time, "sleep", waited.append)
    return waited


@pytest.fixture
def failing(monkeypatch):
    """Lets the reader of jsonl fail with what `problem(calls)` gives, before each record."""

    def install(problem):
        plain, calls = data.documents._RECORDS[SourceFormat.JSONL], iter(range(10**9))

        def records(source, part, begin):
            for record in plain(source, part, begin):
                if error := problem(next(calls)):
                    raise error
                yield record

        monkeypatch.setitem(data.documents._RECORDS, SourceFormat.JSONL, records)

    return install


def names(world, count=30):
    """The documents of so many steps."""
    return [piece[0] for _ in range(count) for row in world.step() for piece in row[3:]]


@pytest.fixture
def config(tmp_path, model_file):
    write(tmp_path / "a", SourceFormat.JSONL, [make_texts(12, seed) for seed in range(3)])
    return config_of(model_file, source_of(tmp_path / "a"))


def test_failures_that_pass_lose_and_repeat_nothing(config, failing, waits):
    with inline(1000):
        unbroken = names(World(config))
        rng = random.Random(1)
        kinds = [OSError(errno.EIO, "Input/output error"), TimeoutError("timed out"), ConnectionResetError("reset by peer")]
        failing(lambda call: rng.choice(kinds) if rng.random() < 0.6 else None)
        assert names(World(config)) == unbroken
    assert len(waits) > 10 and set(waits) <= {1, 2, 4, 8, 16, 32, 60} and max(waits) > 2


def test_a_source_that_stays_away_is_named_after_the_last_attempt(config, failing, waits):
    failing(lambda call: OSError(errno.EIO, "Input/output error") if call > 15 else None)
    with inline(1000), pytest.raises(Outage) as caught:
        names(World(config))
    file = Path(config.sources[0].path) / "1.jsonl"
    assert str(caught.value) == (
        f"source 'lines': path={config.sources[0].path}: {file} cannot be read ([Errno 5] Input/output error); given up after 11 attempts in a row"
    )
    assert waits == list(data.reading.WAITS)


def test_a_source_that_stalls_is_begun_anew(config, failing, waits, monkeypatch):
    with inline(1000):
        unbroken = names(World(config))
        monkeypatch.setattr(data.reading, "STALL_SECONDS", 0.05)
        failing(lambda call: signal.pause() if call == 7 else None)
        assert names(World(config)) == unbroken
    assert waits == [1]


def test_a_file_that_disappears_is_named_at_once(config, waits):
    gone = Path(config.sources[0].path) / "2.jsonl"
    with inline(300):
        world = World(config)
        first, state = names(world, 1), world.state()
        gone.unlink()
        with pytest.raises(ConfigError, match=rf"{gone} cannot be read \(\[Errno 2\] No such file"):
            names(world)
        message = rf"^source 'lines': {gone} is no longer there; a stream goes on only over the files that it began with$"
        with pytest.raises(ConfigError, match=message):
            World(config, state=state)
        # A reading that begins anew after a failure, or in another pass, looks again.
        with pytest.raises(ConfigError, match=message):
            next(read(world.corpora[0]._reading(config.sources[0], Share(), shortest=2, longest=0, num_workers=1), Place()))
    assert first and not waits


@pytest.mark.parametrize(("change", "problem"), [("grow", "has [0-9]+ bytes, it had [0-9]+"), ("add", "was not there")])
def test_files_that_are_others_when_a_run_goes_on_are_named(config, change, problem):
    file = Path(config.sources[0].path) / ("1.jsonl" if change == "grow" else "9.jsonl")
    with inline():
        state = World(config).state()
        with open(file, "a") as more:
            more.write('{"text": "more"}\n')
        with pytest.raises(ConfigError, match=f"{file} {problem} when the run began"):
            World(config, state=state)


def test_a_mistake_in_the_text_is_told_at_once(config, waits):
    with open(Path(config.sources[0].path) / "1.jsonl", "a") as file:
        file.write("no JSON\n")
    with inline(), pytest.raises(ConfigError, match=r"1.jsonl:13 is not JSON"):
        names(World(config))
    assert not waits


def test_what_a_process_of_its_own_reads_fails_as_here(config):
    """One that reads ahead gives the same, hands its mistake on after what came before it, and is missed when it dies."""
    corpus = open_corpus(config, heldout_tokens=0)
    reading = corpus._reading(config.sources[0], Share(1, 2), shortest=40, longest=200, num_workers=1)
    (Path(config.sources[0].path) / "2.jsonl").write_text("no JSON\n")
    reading = replace(reading, parts={name: Path(name).stat().st_size for name in reading.parts})
    here, found = read(reading, Place()), []
    ahead = ReadAhead(reading, Place())
    with pytest.raises(ConfigError, match=r"2.jsonl:1 is not JSON") as caught:
        while True:
            found.append(next(here))
    for document in found:
        other = next(ahead)
        assert (other.tokens == document.tokens).all() and other[1:] == document[1:] and 40 <= len(other.tokens) <= 200
    with pytest.raises(ConfigError) as other:
        next(ahead)
    assert str(other.value) == str(caught.value) and found
    ahead.close()
    killed = ReadAhead(replace(reading, parts=reading.parts), Place())
    killed.close()
    with pytest.raises(Outage, match=r"^source 'lines': the process that reads it died, perhaps out of memory$"):
        while True:
            next(killed)


def test_a_share_without_documents_is_refused(config, tmp_path, model_file):
    with inline():
        with pytest.raises(ConfigError, match="has no training document of at least 9000 tokens for rank 0 of 1"):
            names(World(config, mix=MixConfig(min_document_tokens=9000)), 1)
        write(tmp_path / "one", SourceFormat.JSONL, [["only one"]])
        with pytest.raises(ConfigError, match="for rank 1 of 2"):
            names(World(config_of(model_file, source_of(tmp_path / "one"), heldout_fraction=0.0), 2), 1)


# --- what a state and a config must agree on ---------------------------------------------------------------------------------------------


def test_another_world_seed_or_corpus_is_refused(config, tmp_path, model_file):
    with inline():
        world = World(config, 2)
        world.step()
        state = world.state()
        message = "read by 2 data-parallel ranks, this run has 3; a streamed corpus goes on at the same number of ranks"
        with pytest.raises(ConfigError, match=message):
            World(config, 3, state=state)
        with pytest.raises(ConfigError, match="has seed=0, this run has seed=4"):
            World(config, 2, seed=4, state=state)
        with pytest.raises(ConfigError, match=r"has data.heldout_fraction=0.2, this run has data.heldout_fraction=0.3"):
            World(replace(config, heldout_fraction=0.3), 2, state=state)
        with pytest.raises(ConfigError, match=r"has mix.min_document_tokens=4, this run has mix.min_document_tokens=9"):
            World(config, 2, mix=MixConfig(min_document_tokens=9), state=state)
        with pytest.raises(ConfigError, match=r"is one of a prepared corpus; set data.streaming=false"):
            World(config, state={"pools": {}, "seed": 0, "corpus": 7})
        from data.prepare import prepare

        prepare(replace(config, prepared_dir=str(tmp_path / "prepared")))
        with pytest.raises(ConfigError, match=r"is one of sources that were not prepared; set data.streaming=true"):
            build_loader(tmp_path / "prepared", seq_len=8, rows_per_step=1, micro_batch_rows=1, state=state)


def test_a_failure_on_one_rank_ends_all(config):
    """What ranks tell each other, by hand: targets are summed, a failure is everyone's."""
    shape = {"seq_len": 8, "rows_per_step": 2, "micro_batch_rows": 1, "world_size": 2, "rank": 1}
    with inline():
        corpus = open_corpus(config, heldout_tokens=0)
        loader = build_loader(corpus, gather=lambda value: [(0, 100, None), value], **shape)
        (batch,) = loader.next_step()
        assert batch.step_targets == 100 + batch.num_targets
        failed, whole = (0, 0, ConfigError("gone")), (0, 100, None)
        for others in ([failed], [failed, whole], [whole, failed]):  # in a group that shares rows one may fail alone
            loader = build_loader(corpus, gather=lambda value: [*others, value], **shape)  # noqa: B023
            with pytest.raises(ConfigError, match=r"^gone$"):
                loader.next_step()
        loader = build_loader(corpus, gather=lambda value: [whole, whole, value, value], **shape)
        (batch,) = loader.next_step()
        assert batch.step_targets == 100 + batch.num_targets


def test_held_out_documents_are_those_of_preparation_and_never_trained_on(config, tmp_path):
    with inline(1000):
        corpus = open_corpus(config, heldout_tokens=600)
        table, texts = corpus.split("heldout"), {}
        for number in range(3):
            for line, text in enumerate((Path(config.sources[0].path) / f"{number}.jsonl").read_text().splitlines(), 1):
                texts[f"{config.sources[0].path}/{number}.jsonl:{line}"] = json.loads(text)["text"]
        held = [name for name, text in texts.items() if is_heldout(text_digest(text), HELDOUT)]
        count = table.num_documents
        assert [table.label(i) for i in range(count)] == held[:count]
        assert table.lengths.sum() >= 600 > table.lengths[:-1].sum()
        tokenizer = load_tokenizer(corpus.folder)
        assert [tokenizer.decode(table.tokens(i)) for i in range(count)] == [texts[name] for name in held[:count]]
        assert len(heldout_rows(corpus, seq_len=64, rows=4)) == 4
        trained = set(names(World(config), 80))
    assert trained == set(texts) - set(held)


@pytest.mark.parametrize(
    ("changes", "mixes", "message"),
    [
        ({"sources": ()}, [{}], r"^data.sources=\[\]: must name at least one source"),
        ({"tokenizer": TokenizerConfig()}, [{}], r"^data.tokenizer.kind=train: .* accepted: sentencepiece, huggingface"),
        ({"sources": (source_of(""),)}, [{}], r"^sources.0.path='': must be given for format=jsonl|^data.sources.0.path='': must be given"),
        ({}, [{"temperature": 2}], r"^stages.0.mix.temperature=2.0: needs the lengths of all documents"),
        ({}, [{"buckets": [{"min_tokens": 9}]}], r"^stages.0.mix.buckets=\[9\]: needs the lengths of all documents"),
        ({}, [{"sources": [{"name": "a", "epochs": 2}]}], r"^stages.0.mix.sources=epochs of a: needs the lengths"),
        (
            {},
            [{"sources": [{"name": "aa"}]}],
            r"^stages.0.mix.sources.0.name=aa: no such source, did you mean 'a'\?; data.sources has a, b$",
        ),
        ({}, [{}], r"^stages.0.mix.sources: must give weights to a, b, whose sizes data.streaming=true does not know"),
        (
            {},
            [{"sources": [{"name": "a"}]}, {"sources": [{"name": "a"}], "min_document_tokens": 9}],
            r"^stages.1.mix.min_document_tokens=9: must be 0 as in stages.0",
        ),
    ],
)
def test_what_a_stream_cannot_give_is_refused_before_it_is_opened(model_file, changes, mixes, message):
    given = config_of(model_file, source_of("x", name="a"), source_of("y", name="b"), **changes)
    run = RunConfig(data=given, stages=tuple(StageConfig(mix=from_mapping(MixConfig, mix)) for mix in mixes))
    with pytest.raises(ConfigError, match=message):
        check_run(run, world_size=1)
