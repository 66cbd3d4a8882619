"""Tiny runs on real text, in this process or on ranks of their own."""

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.registry import REPOSITORY, compose
from configs.schema import DataConfig, RunConfig, SourceConfig, SourceFormat, TokenizerConfig
from data.shards import Corpus
from train.checkpoint import ENGINE
from train.fragments import FragmentFolder

_OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEPS, KILLED_IN = 8, 6  # checkpoints at 4 and 8; the kill comes in the 6th step


def corpus_config(folder: Path) -> DataConfig:
    """A hundred real documents under a 512-token BPE; prepared in about two seconds."""
    return DataConfig(
        prepared_dir=str(folder),
        sources=(
            SourceConfig(name="sotu", format=SourceFormat.SOTU, max_documents=30),
            SourceConfig(name="python", format=SourceFormat.PYTHON_STDLIB, max_documents=70),
        ),
        tokenizer=TokenizerConfig(vocab_size=512, train_bytes=200_000),
        heldout_fraction=0.1,
        num_workers=1,
    )


def overrides(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    """A run of STEPS steps of 4 rows of 128 tokens with MoBA(32, 2), evaluated and saved every 4 steps."""
    return [
        "model=tiny",
        f"data.prepared_dir={corpus}",
        f"run_dir={run_dir}",
        "device=cpu",
        "attention.block_size=32",
        "attention.topk=2",
        f"stages.0.tokens={STEPS * 512}",
        "stages.0.seq_len=128",
        "stages.0.batch_tokens=512",
        "checkpoint.every_steps=4",
        "evaluation.every_steps=4",
        "evaluation.rows=2",
        "logging.progress=false",
        *more,
    ]


def streamed_overrides(corpus: Path, folder: Path) -> list[str]:
    """Streams the texts of `corpus`, put into `folder` as JSON lines, a file for each source, under its tokenizer and by weights."""
    opened = Corpus.open(corpus)
    found: dict[str, list[str]] = {}
    for split in ("train", "heldout"):
        table = opened.split(split)
        for number in range(table.num_documents):
            found.setdefault(table.source(number), []).append(json.dumps({"text": opened.tokenizer.decode(table.tokens(number))}))
    for name, records in sorted(found.items()):
        (folder / f"{name}.jsonl").write_text("\n".join(records))
    sources = ", ".join(f"{{name: {name}, format: jsonl, path: {folder}/{name}.jsonl}}" for name in sorted(found))
    tokenizer = f"{{kind: sentencepiece, path: {corpus}/tokenizer.model}}"
    mix = "[{name: python, weight: 0.25}, {name: sotu, weight: 0.75}]"
    settings = {"streaming": "true", "sources": f"[{sources}]", "tokenizer": tokenizer, "heldout_fraction": "0.1", "num_workers": "1"}
    return [f"mix.sources={mix}", *(f"data.{key}={value}" for key, value in settings.items())]


def make_run(corpus: Path, run_dir: Path, *more: str) -> RunConfig:
    """The run that `overrides` describes."""
    return compose(RunConfig, config_name="train", overrides=overrides(corpus, run_dir, *more))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step, exact."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run_dir) if "event" not in line]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The events of one name."""
    return [line for line in lines(run_dir) if line.get("event") == name]


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The parameters in a checkpoint: whole, fp32, by name."""
    saved = FragmentFolder(checkpoint / ENGINE)
    return {name: saved.weight(name) for name in saved.shapes}


def launch(arguments: list[str], *, num_ranks: int, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """`module arguments...` under the deepspeed CLI on gloo ranks, one thread each."""
    launcher = [shutil.which("deepspeed", path=_path()) or "deepspeed", "--module", "--no_local_rank", "--num_gpus", str(num_ranks)]
    return execute([*launcher, "--master_port", str(free_port()), *arguments], timeout=timeout)


def start_ranks(arguments: list[str], *, num_ranks: int, timeout: float = 240, gpus: bool = False) -> subprocess.CompletedProcess[str]:
    """The same without the CLI, whose two imports of deepspeed cost more than a tiny run; when a rank fails the others are ended.

    With `gpus` each rank has a GPU, or the test is skipped where there are too few.
    """
    if gpus and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    shared = environment(gpus=gpus) | {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
        ranks = [subprocess.Popen(command, cwd=REPOSITORY, env=each, stdout=said, stderr=said) for each in environments]
        end = time.monotonic() + timeout
        try:
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(command, timeout)
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
            codes = [rank.wait() for rank in ranks]
        said.seek(0)
        return subprocess.CompletedProcess(command, next(filter(None, codes), 0), "", said.read())


def free_port() -> int:
    """A port that nothing listens on yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def execute(command: list[str], *, timeout: float = 240, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """A command from the repository root with this interpreter's environment, without a GPU."""
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)


def environment(*, gpus: bool = False) -> dict[str, str]:
    """Of a program that is none of this process's ranks and sees no GPU, or the GPUs that this process sees."""
    inherited = {key: value for key, value in os.environ.items() if key not in _OF_A_LAUNCH}
    seen = {} if gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return inherited | seen | {"OMP_NUM_THREADS": "1", "PATH": _path()}


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 1000 bytes: to a program the same as a disk that is full.

    No fixture: pytest reports a test before its fixtures end, and its own output may be a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
