"""Runs over sources that are not prepared: broken off they go on to the bit; held-out rows, figures, mistakes. For two ranks: test_resume."""

from dataclasses import replace
from pathlib import Path

import pytest

from configs.registry import compose
from configs.schema import ConfigError, MixConfig, MixSourceConfig, Packing, PlanConfig, RunConfig
from tests.train.helpers import events, lines, make_run, steps, streamed_overrides
from train.evaluate import open_corpus
from train.loop import train
from train.plan import make_plan


@pytest.fixture(scope="module")
def streamed(corpus, tmp_path_factory) -> list[str]:
    return streamed_overrides(corpus, tmp_path_factory.mktemp("texts"))


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("data.streaming.SHUFFLE_TOKENS", 20_000)


def _run(corpus: Path, run_dir: Path, streamed: list[str], *more: str) -> RunConfig:
    """Four steps of rows of 128 tokens, then four of 256 from one source."""
    run = make_run(corpus, run_dir, "checkpoint.every_steps=1", *streamed, *more)
    first = replace(run.stages[0], tokens=4 * 512)
    second = replace(first, seq_len=256, mix=MixConfig(sources=(MixSourceConfig(name="sotu"),), packing=Packing.BEST_FIT))
    return replace(run, stages=(first, second))


def test_a_streamed_run_broken_off_goes_on_to_the_bit(corpus, ranks, streamed, tmp_path):
    train(_run(corpus, tmp_path / "whole", streamed), ranks)
    for last in (3, 4, 6, 8):
        train(_run(corpus, tmp_path / "run", streamed, f"max_steps={last}"), ranks)
    assert len(steps(tmp_path / "whole")) == 8 and steps(tmp_path / "run") == steps(tmp_path / "whole")
    figures = [line for line in lines(tmp_path / "whole") if "event" not in line]
    assert all(sum(line["tokens_by"].values()) == 2 * 512 * (1 - line["padding"]) for line in figures)
    assert sum(line["tokens_by"]["source/python"] for line in figures[:4]) == 4 * 128  # a quarter of 16 rows
    assert all(line["tokens_by"]["source/python"] == 0 for line in figures[4:])
    (last,) = [event for event in events(tmp_path / "run", "evaluation") if event["step"] == 8]
    assert last["heldout_loss"] == events(tmp_path / "whole", "evaluation")[-1]["heldout_loss"]


def test_a_plan_reads_no_source_and_evaluation_wants_a_prepared_corpus(streamed, tmp_path):
    """Sources that are not there yet may be planned with."""
    given = [*streamed, "data.sources.0.path=/nowhere/x.jsonl", "num_gpus=1", "model.max_seq_len=8192"]
    config = compose(PlanConfig, config_name="train", overrides=given)
    plan = make_plan(config)
    assert "data.streaming=true: sources, vocabulary, held-out rows and resume are checked when the run reads them" in plan.notes
    assert plan.mixes == ()
    with pytest.raises(ConfigError, match=r"^data.streaming=true: evaluation reads a prepared corpus; "):
        open_corpus(config.data, [])


def test_mistakes_end_before_anything_is_written(corpus, ranks, streamed, tmp_path):
    for more, message in (
        (["data.heldout_fraction=0"], r"^data.sources: its heldout split holds no documents"),
        (["data.sources.0.path=/nowhere/x.jsonl"], r"^source 'python': path=/nowhere/x.jsonl: no such file, folder or glob"),
        ([f"data.tokenizer.path={tmp_path}/none"], rf"^data.tokenizer.path={tmp_path}/none: No such file"),
        (["model.vocab_size=500"], r"^model.vocab_size=500: is smaller than the 512 tokens of data.sources$"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(_run(corpus, tmp_path / "run", streamed, *more), ranks)
    assert not (tmp_path / "run").exists()
