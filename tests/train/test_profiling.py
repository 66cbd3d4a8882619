"""`profile.steps`: which steps are watched, what is written, and values that are none."""

import gzip
import json
from pathlib import Path

import pytest

from configs.checks import check_run
from configs.registry import compose
from configs.schema import ConfigError, RunConfig
from tests.train.helpers import events, make_run
from train.loop import train


def _micro_batches(trace: Path) -> int:
    names = [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert any(name.startswith("Optimizer.step#") for name in names)
    assert names.count("aten::embedding") == sum("EmbeddingBackward0" in name and "evaluate_function" in name for name in names)
    return names.count("aten::embedding")


def test_the_steps_asked_for_are_traced_once(corpus, ranks, tmp_path):
    run_dir = tmp_path / "run"
    window = ("profile.steps=2..3", "evaluation.rows=0")
    for last in (4, 5):  # a launch that comes after them watches nothing
        train(make_run(corpus, run_dir, *window, f"max_steps={last}"), ranks)
    (trace,) = (run_dir / "profile").iterdir()
    assert trace.name == "steps_2-3_rank_00000.json.gz" and _micro_batches(trace) == 2 * 4
    assert [(event["step"], event["path"]) for event in events(run_dir, "profile")] == [(3, str(trace))]


def test_a_run_that_ends_among_them_keeps_what_it_saw_and_one_without_writes_nothing(corpus, ranks, tmp_path):
    train(make_run(corpus, tmp_path / "run", "max_steps=1", "evaluation.rows=0"), ranks)
    assert not (tmp_path / "run/profile").exists()
    train(make_run(corpus, tmp_path / "run", "max_steps=2", "evaluation.rows=0", "profile.steps=1..7"), ranks)
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "steps_2-2_rank_00000.json.gz" and _micro_batches(trace) == 4


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("ten", r"^profile.steps=ten: must be FIRST..LAST, such as 10..12$"),
        ("3..2", r"^profile.steps=3..2: must be FIRST..LAST"),
        ("0..2", r"^profile.steps=0..2: must be FIRST..LAST"),
        ("-1..2", r"^profile.steps=-1..2: must be FIRST..LAST"),
        ("7..9", r"^profile.steps=7..9: the run has 8 steps$"),
    ],
)
def test_steps_that_are_none_are_refused(corpus, tmp_path, steps, message):
    with pytest.raises(ConfigError, match=message):
        check_run(make_run(corpus, tmp_path / "run", f"profile.steps={steps}"), world_size=1)


def test_the_window_is_typed_as_it_is_said():
    assert list(compose(RunConfig, config_name="train", overrides=["profile.steps=10..12"]).profile.window) == [10, 11, 12]
