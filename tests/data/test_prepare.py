"""Preparation: the same bytes from any number of workers, held-out by text, complete or absent."""

import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.prepare
import data.workers
from configs.schema import ConfigError, SourceConfig, SourceFormat, TokenizerConfig, TokenizerKind
from data.loader import IGNORE, build_loader
from data.prepare import find_prepared, prepare
from data.shards import Corpus, length_histogram
from tests.data.conftest import make_texts

ROOT = Path(__file__).parents[2]


def contents(config):
    return {path.name: path.read_bytes() for path in Path(config.prepared_dir).iterdir()}


def texts_of(corpus, split):
    table = corpus.split(split)
    texts = []
    for document in range(table.num_documents):
        ids = table.tokens(document)
        assert ids[0] == corpus.tokenizer.bos_id and ids[-1] == corpus.tokenizer.eos_id and len(ids) == table.lengths[document]
        texts.append(corpus.tokenizer.decode(ids[1:-1]))
        assert table.byte_length(document) == len(texts[-1].encode())
        assert table.text_hash(document) == data.prepare.text_digest(texts[-1]).hex()
    return texts


def test_every_document_comes_back_from_the_split_its_text_decides(jsonl_config):
    texts = make_texts(60)
    config = jsonl_config([*texts, texts[3], "", " \n", "x"], shard_tokens=2000)
    manifest = prepare(config)
    corpus = Corpus.open(config.prepared_dir, verify=True)
    train, heldout = texts_of(corpus, "train"), texts_of(corpus, "heldout")
    assert sorted(train + heldout) == sorted(texts) and not set(train) & set(heldout) and heldout
    assert manifest.dropped == {"invalid_utf8": 0, "empty": 2, "duplicate": 1, "too_short": 1}
    source = config.sources[0].path
    assert manifest.dropped_names == {
        "duplicate": [f"{source}:61"],
        "empty": [f"{source}:62", f"{source}:63"],
        "too_short": [f"{source}:64"],
    }
    counts = manifest.splits["train"]
    assert counts.documents == len(train) and counts.bytes == sum(len(text.encode()) for text in train)
    assert counts.tokens == corpus.split("train").lengths.sum() and counts.longest == corpus.split("train").lengths.max()
    assert counts.by_source == {"lines": {"documents": counts.documents, "tokens": counts.tokens, "bytes": counts.bytes}}
    assert len(counts.shards) > 2 and corpus.split("train").source(0) == "lines"
    assert sum(documents for _, documents, _ in length_histogram(corpus.split("train").lengths)) == counts.documents


def test_documents_of_a_token_or_none_are_left_out_or_trained_on_as_asked(jsonl_config, tmp_path):
    texts = ["", "x", "y", "z", *make_texts(20)]
    lengths = {}
    for least, dropped in ((1, 0), (2, 3)):
        config = jsonl_config(texts, min_document_tokens=least, prepared_dir=str(tmp_path / f"least{least}"), heldout_fraction=0.0)
        assert prepare(config).dropped == {"invalid_utf8": 0, "empty": 1, "duplicate": 0, "too_short": dropped}
        loader = build_loader(config.prepared_dir, seq_len=64, rows_per_step=4, micro_batch_rows=4)
        seen = [batch for _ in range(loader.epoch_tokens // 256) for batch in loader.next_step()]
        assert all((batch.labels != IGNORE).sum() == batch.num_targets > 0 for batch in seen)
        lengths[least] = sorted(Corpus.open(config.prepared_dir).split("train").lengths.tolist())
    assert lengths[1] == [3, 3, 3, *lengths[2]]  # a token between its separators


def test_output_does_not_depend_on_workers(jsonl_config, tmp_path, monkeypatch):
    monkeypatch.setattr(data.workers, "_CHUNK_CHARACTERS", 5000)
    tokenizer = TokenizerConfig(vocab_size=384, train_bytes=20_000)
    one, two = (jsonl_config(make_texts(60), tokenizer=tokenizer, num_workers=n, prepared_dir=str(tmp_path / f"with{n}")) for n in (1, 2))
    prepare(one)
    prepare(two)
    assert contents(one) == contents(two)


def test_trained_tokenizer_sees_training_documents_alone(jsonl_config, tmp_path):
    texts = make_texts(60)
    config = jsonl_config(texts, tokenizer=TokenizerConfig(vocab_size=384))
    sample, total = data.prepare._sample(config, tmp_path, lambda *report: None)
    prepare(config)
    heldout = texts_of(Corpus.open(config.prepared_dir), "heldout")
    assert total == sum(len(text.encode()) for text in texts)
    assert not any(text.splitlines()[0] in "".join(sample) for text in heldout)
    part, _ = data.prepare._sample(replace(config, tokenizer=TokenizerConfig(train_bytes=9000)), tmp_path, lambda *report: None)
    assert set(part) < set(sample) and 9000 <= sum(len(piece.encode()) for piece in part) < 9000 + 4 * 4096


@pytest.mark.parametrize("fmt", [SourceFormat.TEXT, SourceFormat.FILES, SourceFormat.PARQUET])
def test_formats_give_one_corpus(jsonl_config, tmp_path, fmt):
    texts = make_texts(30)
    folder = tmp_path / "source"
    folder.mkdir()
    if fmt is SourceFormat.PARQUET:
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
    else:
        for i, text in enumerate(texts):
            (folder / f"{i:03d}.txt").write_bytes(text.encode())
    lines = jsonl_config(texts)
    other = replace(lines, prepared_dir=str(tmp_path / "other"), sources=(SourceConfig(name="lines", format=fmt, path=str(folder)),))
    prepare(lines)
    prepare(other)
    first, second = contents(lines), contents(other)
    assert {**first, "manifest.json": b""} == {**second, "manifest.json": b""}


@pytest.mark.parametrize("tokenizer", [None, TokenizerConfig(vocab_size=384)])
def test_progress_tells_how_much_there_is(jsonl_config, tokenizer):
    texts = make_texts(60)
    reports = []
    config = jsonl_config(texts, **({"tokenizer": tokenizer} if tokenizer else {}))
    prepare(config, progress=lambda *report: reports.append(report))
    size = sum(len(text.encode()) for text in texts)
    for phase in ["sample", "tokenise"] if tokenizer else ["tokenise"]:
        done, total = zip(*(report[1:] for report in reports if report[0] == phase))
        assert list(done) == sorted(done) and done[-1] == size and len(done) == len(texts)
        assert all(0.5 * size < each < 3 * size for each in total[30:]) and total[-1] == pytest.approx(size, rel=0.01)
    two = replace(config.sources[0], name="capped", max_documents=5)  # of another unit: nothing is said rather than a guess
    reports.clear()
    prepare(replace(config, sources=(config.sources[0], two)), overwrite=True, progress=lambda *report: reports.append(report))
    assert {report[2] for report in reports if report[0] == "sample"} <= {0}


def test_more_documents_move_none_between_splits(jsonl_config, tmp_path):
    few = jsonl_config(make_texts(40), prepared_dir=str(tmp_path / "few"))
    prepare(few)
    many = jsonl_config(make_texts(30, seed=5) + make_texts(40)[::-1], prepared_dir=str(tmp_path / "many"))
    prepare(many)
    before, after = Corpus.open(few.prepared_dir), Corpus.open(many.prepared_dir)
    for split in ("train", "heldout"):
        assert set(texts_of(before, split)) < set(texts_of(after, split))


def test_a_finished_corpus_is_reused_and_another_config_refused(jsonl_config, tmp_path):
    config = jsonl_config(make_texts(20))
    assert find_prepared(config) is None
    manifest = prepare(config)
    changed = (Path(config.prepared_dir) / "manifest.json").stat().st_mtime_ns
    assert prepare(replace(config, num_workers=2, name="else")) == manifest
    assert (Path(config.prepared_dir) / "manifest.json").stat().st_mtime_ns == changed
    with pytest.raises(ConfigError, match=r"data.heldout_fraction=0.3: .* was prepared with 0.2; overwrite=true"):
        prepare(replace(config, heldout_fraction=0.3))
    source = replace(config.sources[0], max_documents=15)
    with pytest.raises(ConfigError, match=r"data.sources.0.max_documents=15"):
        prepare(replace(config, sources=(source,)))
    smaller = prepare(replace(config, sources=(source,)), overwrite=True)
    assert sum(split.documents for split in smaller.splits.values()) == 15
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["corpus"]


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, r"no documents \(left out: none\)"),
        (["", "x"], {}, r"no documents \(left out: 1 empty \(.*texts.jsonl:1\), 1 too_short \(.*texts.jsonl:2\)\)"),
        (["\0", "\0\0"] * 10, {"tokenizer": TokenizerConfig(vocab_size=384), "heldout_fraction": 0.0}, "vocab_size=384: there is no text"),
        (make_texts(5), {"heldout_fraction": 1.0}, "all 5 documents are held out"),
        (make_texts(5), {"heldout_fraction": 1e-9}, "none of 5 documents is held out"),
        (make_texts(5), {"sources": ()}, "at least one source"),
        (make_texts(20), {"tokenizer": TokenizerConfig(vocab_size=9000)}, "vocab_size=9000"),
        (make_texts(20), {"tokenizer": TokenizerConfig(kind=TokenizerKind.HUGGINGFACE, path="/none.json")}, "/none.json"),
        ([], {"tokenizer": TokenizerConfig(vocab_size=300)}, "no documents"),
    ],
)
def test_corpora_without_use_are_refused_and_leave_nothing(jsonl_config, tmp_path, texts, changes, message):
    config = jsonl_config(texts, prepared_dir=str(tmp_path / "new" / "folders" / "corpus"), **changes)
    with pytest.raises(ConfigError, match=message) as refusal:
        prepare(config)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_no_heldout_documents_on_purpose(jsonl_config):
    config = jsonl_config(make_texts(5), heldout_fraction=0.0)
    assert prepare(config).splits["heldout"].documents == 0
    assert Corpus.open(config.prepared_dir).split("heldout").num_documents == 0


def test_a_vocabulary_over_16_bits_is_kept_whole(jsonl_config, monkeypatch):
    from data.tokenizer import SentencePieceTokenizer

    config = jsonl_config(make_texts(20))
    plain = SentencePieceTokenizer.__init__

    def widened(self, *given):
        plain(self, *given)
        self.vocab_size, self.eos_id = 70_000, 69_999

    monkeypatch.setattr(SentencePieceTokenizer, "__init__", widened)
    prepare(config)
    ids = Corpus.open(config.prepared_dir).split("train").tokens(0)
    assert ids.dtype == np.uint32 and ids[-1] == 69_999


def test_a_write_that_the_kernel_refuses_leaves_nothing_and_keeps_what_was(jsonl_config, tmp_path):
    """A limit on the size of files ends a shard in its middle, as a full disk does."""
    config = jsonl_config(make_texts(200))
    prepare(config)
    before = contents(config)
    other = replace(config, heldout_fraction=0.3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))
    try:
        for target in ("corpus", "fresh"):
            with pytest.raises(ConfigError, match=rf"data.prepared_dir={tmp_path}/{target}: the disk is full .*nothing was kept"):
                prepare(replace(other, prepared_dir=str(tmp_path / target)), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(config) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "texts.jsonl"]


def test_what_is_not_ours_is_left_alone(jsonl_config, tmp_path):
    config = jsonl_config(make_texts(20))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="exists and is no corpus"):
            prepare(config, overwrite=overwrite)
    assert (tmp_path / "corpus" / "thesis.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare(replace(config, prepared_dir=str(tmp_path / "file" / "corpus")))


def test_workers_end_with_a_parent_that_is_killed(model_file):
    code = (
        "import itertools, pathlib, sys, numpy\n"
        "from data.workers import tokenise\n"
        "if __name__ == '__main__':\n"
        "    chunks = ((i, 'text ' * 1000) for i in itertools.count())\n"
        "    for i, ids in tokenise(chunks, pathlib.Path(sys.argv[1]), numpy.dtype('<u2'), 2, bos_id=1, eos_id=2):\n"
        "        if i == 3: print(*[p.pid for p in __import__('multiprocessing').active_children()], flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(model_file)], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_two_at_once_and_a_killed_one(jsonl_config, tmp_path):
    config = jsonl_config(make_texts(20))
    partial = tmp_path / "corpus.partial"
    partial.mkdir()
    (partial / "train-00007.bin").write_bytes(b"left by a process that was killed")
    code = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(partial)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process is preparing it"):
            prepare(config)
        other.stdin.close()
    prepare(config)
    assert "train-00007.bin" not in contents(config) and not partial.exists()
