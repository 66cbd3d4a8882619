"""A corpus that is missing, cut, altered or of another tokenizer is refused, and the file is named."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from configs.registry import compose
from configs.schema import ConfigError, PrepareConfig
from data import shards
from data.manifest import INDEX
from data.prepare import prepare
from data.shards import Corpus, verify_corpus
from tests.data.conftest import make_texts


@pytest.fixture
def folder(jsonl_config) -> Path:
    config = jsonl_config(make_texts(40))
    prepare(config)
    return Path(config.prepared_dir)


def refused(folder, **given) -> str:
    with pytest.raises(ConfigError) as refusal:
        Corpus.open(folder, **given)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_missing_corpus_names_the_key_and_a_command_that_works(tmp_path):
    folder = tmp_path / "my books"
    message = refused(folder)
    assert message.startswith(f"data.prepared_dir={folder}: no prepared corpus there")
    program, *overrides = shlex.split(message.split("`")[1])[2:]
    assert program == "scripts.prepare_data"
    assert compose(PrepareConfig, config_name="prepare_data", overrides=overrides).data.prepared_dir == str(folder)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")  # where preparing would be refused
    assert refused(folder) == f"data.prepared_dir={folder}: is no prepared corpus, manifest.json is missing; name another folder"


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "heldout-00000.bin", "train-index.npy", "heldout-index.npy", "tokenizer.model", "manifest.json"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "remove"])
def test_every_harm_to_every_file_is_refused_by_name(folder, name, harm):
    path = folder / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "grow":
        path.write_bytes(content + b"}")
    else:
        path.unlink()
    message = refused(folder)
    if (name, harm) == ("manifest.json", "remove"):
        assert "is no prepared corpus, manifest.json is missing" in message
        return
    assert name in message and "overwrite=true" in message
    if name == "tokenizer.model" and harm == "flip":
        assert "not the tokenizer the shards were made with" in message


def test_large_corpora_skip_only_the_shards_checksums(folder):
    path = folder / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    corpus = Corpus.open(folder, verify=False)
    assert "train-00000.bin" in refused(folder, verify=True)
    with pytest.raises(ConfigError, match=r"train-00000\.bin"):
        verify_corpus(folder, corpus.manifest)
    index = folder / "train-index.npy"
    content = bytearray(index.read_bytes())
    content[-1] ^= 1
    index.write_bytes(content)
    assert "train-index.npy" in refused(folder, verify=False)


def test_the_index_of_a_very_large_corpus_is_not_read_whole_and_what_it_cannot_mean_is_refused(folder, monkeypatch):
    monkeypatch.setattr(shards, "_VERIFY_BYTES", 1000)
    path = folder / "train-index.npy"
    index = np.load(path)
    assert index.nbytes > 1000
    index["offset"][3] += 10**6
    np.save(path, index)
    table = Corpus.open(folder).split("train")
    assert len(table.tokens(2)) == table.lengths[2]
    with pytest.raises(ConfigError, match=r"train-index\.npy: document 3 lies outside its shard; prepare again"):
        table.tokens(3)
    assert "train-index.npy" in refused(folder, verify=True)
    size = path.stat().st_size
    with open(path, "wb") as file:
        np.save(file, np.zeros(3, INDEX))
        file.truncate(size)
    with pytest.raises(ConfigError, match=r"train-index\.npy: holds 3 records of another kind or number"):
        Corpus.open(folder).split("train")


def test_columns_of_the_index_are_those_of_the_file(folder, monkeypatch):
    monkeypatch.setattr(shards, "_INDEX_BATCH", 7)
    table = Corpus.open(folder).split("train")
    index = np.load(folder / "train-index.npy")
    assert table.lengths.tolist() == index["length"].tolist() and table.source_numbers.tolist() == index["source"].tolist()


@pytest.mark.parametrize("content", ["", "[]", "12", '"text"', "{}", "[" * 100_000, '{"checksum": 1, "format_version": 1}'])
def test_a_manifest_that_is_none_is_refused(folder, content):
    (folder / "manifest.json").write_text(content)
    assert f"{folder}/manifest.json: " in refused(folder)


def test_what_the_system_refuses_to_read_is_named(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()  # not even root reads a folder as a file
    assert f"{folder}/manifest.json: cannot be read (Is a directory)" in refused(folder)


def test_another_format_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    assert "format 2" in refused(folder)


def test_splits_have_names(folder):
    corpus = Corpus.open(folder)
    assert corpus.vocab_size == 384 and corpus.tokenizer_hash == corpus.tokenizer.hash
    with pytest.raises(ConfigError, match="split=test: accepted: train, heldout"):
        corpus.split("test")
