"""Documents that are larger than anything usual: memory stays within a few times the document, and every token is there."""

import json
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data.prepare
import data.workers
from configs.schema import SourceConfig, SourceFormat
from data.prepare import prepare
from data.shards import Corpus
from data.tokenizer import Tokenizer
from tests.data.conftest import make_texts

MEGABYTE = 1 << 20


def _peak() -> int:
    """Bytes that this process has held at most."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


class Bytes(Tokenizer):
    """A token for each byte: as cheap as a tokenizer can be."""

    file_name, hash, vocab_size, bos_id, eos_id = "tokenizer.model", "bytes", 258, 256, 257

    def _encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)  # type: ignore[return-value]

    def decode(self, ids):
        return bytes(ids).decode()

    def settings(self):
        return {}


def _prepare(config, pipe) -> None:
    data.workers.load_tokenizer = lambda path: Bytes()
    data.prepare.load_tokenizer = lambda path: Bytes()
    before = _peak()
    prepare(config)
    pipe.send(_peak() - before)


def prepare_elsewhere(config) -> int:
    """Prepares with `Bytes` in a process of its own; bytes by which its memory grew."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_prepare, args=(config, there))
    process.start()
    grown = here.recv()
    process.join()
    return grown


def test_a_document_of_ten_million_tokens(jsonl_config, tmp_path):
    text = "\n".join(make_texts(12_000, seed=3))
    text = text * (10_000_000 // len(text.encode()) + 1)
    config = jsonl_config([text, *make_texts(3)], heldout_fraction=0.0, shard_tokens=1000)
    assert prepare_elsewhere(config) < 12 * len(text.encode())
    table = Corpus.open(config.prepared_dir).split("train")
    assert table.lengths[0] == len(text.encode()) + 2 > 10_000_000 and table.num_documents == 4
    assert table.counts.longest == table.lengths[0]
    assert bytes(table.tokens(0)[1:-1].astype(np.uint8)) == text.encode()


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [SourceFormat.JSONL, SourceFormat.TEXT])
def test_a_line_of_100_megabytes(jsonl_config, tmp_path, fmt):
    text = "no line end in it, " * (100 * MEGABYTE // 19)
    folder = tmp_path / "source"
    folder.mkdir()
    if fmt is SourceFormat.JSONL:
        (folder / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n")
    else:
        (folder / "a.txt").write_text(text)
        (folder / "b.txt").write_text("short")
    source = SourceConfig(name="long", format=fmt, path=str(folder))
    config = replace(jsonl_config([]), sources=(source,), heldout_fraction=0.0)
    grown = prepare_elsewhere(config)
    assert grown < 8 * len(text)  # its text, its tokens of 2 bytes twice, and what reading takes before
    table = Corpus.open(config.prepared_dir, verify=True).split("train")
    assert table.lengths.tolist() == [len(text) + 2, 7]


@pytest.mark.slow
def test_a_tokenizer_of_the_library_reads_a_line_of_30_megabytes(jsonl_config):
    """Sentencepiece alone takes gigabytes for it."""
    text = "no line end in it, " * (30 * MEGABYTE // 19)
    config = jsonl_config([text], heldout_fraction=0.0, num_workers=2)
    before = _peak()
    prepare(config)
    assert _peak() - before < 12 * len(text)
    corpus = Corpus.open(config.prepared_dir, verify=True)
    table = corpus.split("train")
    ids = table.tokens(0)
    assert "".join(corpus.tokenizer.decode(ids[i : i + MEGABYTE]) for i in range(1, len(ids) - 1, MEGABYTE)) == text
