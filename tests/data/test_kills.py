"""Preparation that is killed, at any write and for good, and started again ends in the bytes of an unbroken one, with nothing done twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import data.prepare
import data.tokenizer
from configs.schema import ConfigError, SourceConfig, SourceFormat, TokenizerConfig
from data.documents import Outage
from data.prepare import prepare
from data.shards import Corpus
from data.writer import STATE_NAME
from tests.data.conftest import make_texts, write_jsonl

ROOT = Path(__file__).parents[2]
# Calls after which something on the disk may be other than before. What Python has buffered is lost with the process, as in any kill.
WRITES = {
    "write",
    "flush",
    "fsync",
    "replace",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "truncate",
    "close",
    "posix_fallocate",
    "dump",
    "open",
}


@pytest.fixture
def many_commits(monkeypatch):
    """Commits after every few documents."""
    monkeypatch.setattr(data.prepare, "_PLACE_BYTES", 3000)
    monkeypatch.setattr(data.prepare, "_COMMIT_BYTES", 9000)


def contents(config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.prepared_dir).iterdir()}


def run_until(config, write: int) -> tuple[bool, int]:
    """Prepares in a child process that is killed at its `write`-th write. Returns whether it lived, and how many writes it made."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def profile(frame, event, function) -> None:
            nonlocal count
            if event == "c_call" and function.__name__ in WRITES:
                count += 1
                if count == write:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(profile)
            prepare(config)
            sys.setprofile(None)
            os.write(writes, str(count).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads, "rb") as pipe:
        made = pipe.read()
    os.waitpid(child, 0)
    return bool(made), int(made or 0)


def make_sources(folder: Path) -> tuple[SourceConfig, ...]:
    """Two sources with all there is to leave out, duplicates across them among it."""
    texts = make_texts(50)
    first = write_jsonl(folder / "first.jsonl", [*texts[:30], "", "x", texts[2], "y", *texts[30:], "x"])
    (folder / "second").mkdir()
    for i, text in enumerate([*make_texts(15, seed=4), texts[7], "y", " "]):
        (folder / "second" / f"{i:02d}.txt").write_bytes(text.encode())
    (folder / "second" / "05b.txt").write_bytes(b"\xff\xfe")
    return (
        SourceConfig(name="lines", format=SourceFormat.JSONL, path=str(first)),
        SourceConfig(name="texts", format=SourceFormat.TEXT, path=str(folder / "second")),
    )


def test_fifty_kills_change_nothing(jsonl_config, tmp_path, many_commits):
    sources = make_sources(tmp_path)
    config = replace(jsonl_config([], shard_tokens=3000), sources=sources)
    unbroken = replace(config, prepared_dir=str(tmp_path / "unbroken"))
    lived, writes = run_until(unbroken, 0)
    expected = contents(unbroken)
    dropped = json.loads(expected["manifest.json"])["dropped"]
    assert lived and writes > 300 and dropped == {"invalid_utf8": 1, "empty": 2, "duplicate": 4, "too_short": 2}
    rng = random.Random(0)
    killed = went_on = 0
    while killed < 50:
        at = rng.randint(1, writes)
        while not run_until(config, at)[0]:
            killed += 1
            went_on += (Path(f"{config.prepared_dir}.partial") / STATE_NAME).exists()
            assert not Path(config.prepared_dir).exists() or "manifest.json" in contents(config)
            at = rng.randint(1, writes // 2)
        prepare(config)  # takes away what a kill between the last rename and the end has left
        assert contents(config) == expected
        assert not Path(f"{config.prepared_dir}.partial").exists()
        for path in Path(config.prepared_dir).iterdir():
            path.unlink()
        Path(config.prepared_dir).rmdir()
    assert went_on > 25  # most kills find a commit


def test_what_was_committed_is_not_tokenised_again(jsonl_config, tmp_path, many_commits, monkeypatch):
    config = jsonl_config(make_texts(60))
    encoded = []
    plain = data.tokenizer.SentencePieceTokenizer.encode_stretch

    def counted(self, part, **given):
        encoded.append(part)
        if len(encoded) == 40:
            raise Outage("the network is down")
        return plain(self, part, **given)

    monkeypatch.setattr(data.tokenizer.SentencePieceTokenizer, "encode_stretch", counted)
    with pytest.raises(Outage):
        prepare(config)
    state = json.loads((tmp_path / "corpus.partial" / STATE_NAME).read_text())
    kept = sum(split["documents"] for split in state["splits"].values())
    assert 20 < kept < 40
    prepare(config)
    assert len(encoded) == 40 + (60 - kept)


def test_the_tokenizer_is_not_learnt_again(jsonl_config, tmp_path, monkeypatch):
    config = jsonl_config(make_texts(60), tokenizer=TokenizerConfig(vocab_size=384))
    with monkeypatch.context() as patch:
        patch.setattr(data.prepare, "tokenise", lambda *given, **more: (_ for _ in ()).throw(Outage("the power is cut")))
        with pytest.raises(Outage):
            prepare(config)
    monkeypatch.setattr(data.prepare, "train_tokenizer", lambda *given, **more: pytest.fail("learnt again"))
    prepare(config)


@pytest.mark.parametrize("change", ["config", "file", "time", "cut"])
def test_what_is_kept_of_other_sources_is_not_gone_on_from(jsonl_config, tmp_path, many_commits, change):
    config = jsonl_config(make_texts(60))
    _, writes = run_until(replace(config, prepared_dir=str(tmp_path / "unbroken")), 0)
    assert not run_until(config, writes // 2)[0]
    partial = tmp_path / "corpus.partial"
    assert (partial / STATE_NAME).exists()
    if change == "config":
        config = replace(config, heldout_fraction=0.3)
    elif change == "file":
        write_jsonl(tmp_path / "texts.jsonl", make_texts(61))
    elif change == "time":
        os.utime(tmp_path / "texts.jsonl", ns=(1, 1))
    else:
        os.truncate(partial / "train-00000.bin", 2)
    prepare(config)
    fresh = replace(config, prepared_dir=str(tmp_path / "fresh"))
    prepare(fresh)
    assert contents(config) == contents(fresh)


def test_a_mistake_in_the_middle_leaves_nothing(jsonl_config, tmp_path, many_commits):
    config = jsonl_config(make_texts(60))
    with open(tmp_path / "texts.jsonl", "a") as file:
        file.write("no JSON\n")
    with pytest.raises(ConfigError, match=r"texts.jsonl:61 is not JSON"):
        prepare(config)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_goes_on_where_a_signal_ended_it(tmp_path, model_file, number):
    """The program itself, with two workers; resumed with one."""
    source = write_jsonl(tmp_path / "a.jsonl", [text * 20 for text in make_texts(250)])
    arguments = ["data=jsonl", f"data.sources.0.path={source}", "data.tokenizer.kind=sentencepiece", f"data.tokenizer.path={model_file}"]
    arguments += ["data.shard_tokens=100000"]
    command = [sys.executable, "-m", "scripts.prepare_data", *arguments]
    target = tmp_path / "corpus"
    with subprocess.Popen([*command, f"data.prepared_dir={target}", "data.num_workers=2"], cwd=ROOT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "corpus.partial" / STATE_NAME).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        said = process.stderr.read()
    if number is signal.SIGTERM:
        assert said == b"interrupted by SIGTERM: what was finished is kept, and the same command goes on from there\n"
    assert (tmp_path / "corpus.partial" / STATE_NAME).exists() and not target.exists()
    for folder in (target, tmp_path / "unbroken"):
        subprocess.run([*command, f"data.prepared_dir={folder}", "data.num_workers=1"], cwd=ROOT, check=True, capture_output=True)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "unbroken").iterdir()}
    assert not (tmp_path / "corpus.partial").exists() and Corpus.open(target, verify=True)
