"""The quickstart in miniature, as a program: it goes on after an interruption, reuses what is done, and never passes old results off."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.mapping import to_mapping
from configs.registry import REPOSITORY
from scripts import launching, quickstart
from tests.train.helpers import events, steps

STEPS = 60
# The corpus is that of tests.train.helpers.
MINIATURE = [
    "model=tiny",
    "attention.block_size=32",
    "attention.topk=2",
    f"stages.0.tokens={STEPS * 256}",
    "stages.0.seq_len=128",
    "stages.0.batch_tokens=256",
    "evaluation.every_steps=0",
    "evaluation.rows=2",
    "++data.sources.0.max_documents=30",
    "++data.sources.1.max_documents=70",
    "data.tokenizer.vocab_size=512",
    "data.tokenizer.train_bytes=200_000",
]
PROGRAM = """
import sys
from pathlib import Path
from scripts import quickstart
from scripts.program import run
quickstart.FOLDER = Path(sys.argv[1])
run(lambda: quickstart.main(sys.argv[2:]), interrupted="run it again to go on")
"""


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [str(folder / "results"), *MINIATURE, f"data.prepared_dir={folder}/corpus", *more]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said = process.communicate(timeout=120)
    return process.returncode, *said


def still_running(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if str(folder).encode() in words:
            found.append(words.decode())
    return found


def test_interrupted_it_goes_on_and_done_it_is_reused(tmp_path):
    process = start(tmp_path)
    metrics = tmp_path / "results" / "moba" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, _, errors = finish(process)
    assert (status, errors.splitlines()[-1]) == (128 + signal.SIGTERM, "interrupted by SIGTERM: run it again to go on")
    assert still_running(tmp_path) == []
    assert 0 < len(steps(metrics.parent)) < STEPS

    status, printed, errors = finish(start(tmp_path))
    assert status == 0, errors
    assert "already prepared" in printed and printed.splitlines()[-3:] == [
        str(tmp_path / "results" / name) for name in ("report.md", "loss.png", "position.png")
    ]
    for arm in ("full", "moba"):
        assert [step for step, _, _ in steps(tmp_path / "results" / arm)] == [*range(1, STEPS + 1)]
    assert len(events(metrics.parent, "resume")) == 1
    report = (tmp_path / "results" / "report.md").read_text()
    assert report.count("| moba(32, 2) ") == 3 and report.count("| full ") == 3  # trained; under each of the two weights

    made = [metrics, metrics.parent / "evaluation" / "evaluation.json"]
    before = [path.stat().st_mtime_ns for path in made]
    status, _, errors = finish(start(tmp_path))
    assert status == 0 and "training" not in errors and "evaluating" not in errors
    assert [path.stat().st_mtime_ns for path in made] == before


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The quickstart in this process, with its results in the folder returned."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(quickstart, "FOLDER", tmp_path / "results")
    return tmp_path / "results"


def test_a_training_that_fails_ends_the_other_and_shows_its_error_and_its_log(here, capsys, monkeypatch):
    launcher = here.with_name("deepspeed")
    fails = "case $* in *name=quickstart_moba*) echo starting; echo 'error: a=1: no'; echo 'launcher: exits' >&2; exit 2;; esac"
    launcher.write_text(f"#!/bin/sh\n{fails}\nsleep 300\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(launching.shutil, "which", lambda name, path: str(launcher))
    monkeypatch.setattr(quickstart.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        quickstart._train(quickstart._plan(MINIATURE), MINIATURE)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"quickstart: training moba ended with status 2; see {here}/moba.log",
        "error: a=1: no",
    ]
    assert still_running(here) == []


def refused(capsys, *more: str) -> str:
    with pytest.raises(SystemExit) as ended:
        quickstart.main([*MINIATURE, *more])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    return printed.err


def test_other_overrides_are_no_reuse(here, capsys):
    made = quickstart._plan(MINIATURE)["moba"]
    (here / "moba").mkdir(parents=True)
    (here / "moba" / "config.json").write_text(json.dumps(to_mapping(made)))
    assert quickstart._plan(MINIATURE)["moba"] == made
    message = refused(capsys, "parallel=zero2")
    assert message.startswith(f"error: parallel.zero_stage=2: {here} holds a quickstart with 1; repeat its overrides, or move")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run_dir=elsewhere", "run_dir=elsewhere: the quickstart sets run_dir itself"),
        ("+attention.rule=full", "+attention.rule=full: the quickstart sets attention.rule itself"),
        ("max_steps=3", "max_steps=3: the quickstart sets max_steps itself"),
        ("stages.0.tokens=none", "stages.0.tokens='none': must be an integer"),
    ],
)
def test_overrides_that_would_break_it_are_refused(here, capsys, override, message):
    assert refused(capsys, override).startswith(f"error: {message}")
    assert not here.exists()


def test_help_is_its_usage(capsys):
    quickstart.main(["--help"])
    assert "python -m scripts.quickstart [key=value ...]" in capsys.readouterr().out
