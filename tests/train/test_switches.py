"""Switches between stages, and branches: whatever is broken off and taken up again goes on as if it had not been."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.schema import ConfigError, RopeConfig, RunConfig
from data.loader import heldout_rows
from data.shards import Corpus
from model.transformer import Transformer
from tests.train.helpers import events, lines, make_run, steps
from train.engine import Engine
from train.initial import load_into
from train.loop import train

STEP = 512  # tokens
# Two steps each; every switch of one stage to the next changes what its name says.
STAGES = ("full", "moba", "full again", "longer rows", "theta")
SWITCHES = (2, 4, 6, 8)
EVERYTHING_KEPT = ("checkpoint.every_steps=1", "checkpoint.keep_last=20")


def _staged(corpus: Path, run_dir: Path, *more: str) -> RunConfig:
    run = make_run(corpus, run_dir, *EVERYTHING_KEPT, *more)
    moba = replace(run.stages[0], tokens=2 * STEP)
    full = replace(moba, attention=replace(moba.attention, rule="full"))
    longer = replace(moba, seq_len=256, attention=replace(moba.attention, rule="last 1 full, rest moba"))
    stages = (full, moba, full, longer, replace(longer, rope=RopeConfig(theta=5e5)))
    return replace(run, stages=tuple(replace(stage, name=name) for stage, name in zip(stages, STAGES, strict=True)))


@pytest.fixture(scope="module")
def whole(corpus, ranks, tmp_path_factory) -> Path:
    """The folder of the run of all stages, unbroken."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(_staged(corpus, folder), ranks)
    return folder


def _same(broken: Path, whole: Path) -> None:
    assert len(steps(whole)) == 10 and steps(broken) == steps(whole)
    assert events(broken, "switch") == events(whole, "switch")


def test_a_run_broken_off_after_every_step_goes_on_to_the_bit(whole, corpus, ranks, tmp_path):
    for last in range(1, 11):
        train(_staged(corpus, tmp_path / "run", f"max_steps={last}"), ranks)
    _same(tmp_path / "run", whole)
    assert events(tmp_path / "run", "evaluation")[-1] == events(whole, "evaluation")[-1]


def test_a_run_killed_in_the_last_step_before_each_switch_goes_on_to_the_bit(whole, corpus, ranks, tmp_path, monkeypatch):
    plain = Engine.step

    def step(self, lr):
        if len(steps(tmp_path / "run")) + 1 in SWITCHES:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, lr)

    monkeypatch.setattr(Engine, "step", step)
    for end in (*SWITCHES, 10):
        train(_staged(corpus, tmp_path / "run"), ranks)
        assert len(steps(tmp_path / "run")) == end
        assert len(events(tmp_path / "run", "switch")) == (end - 1) // 2  # the switch after this step is still to come
    _same(tmp_path / "run", whole)


def test_both_losses_of_a_switch_are_those_of_one_model_on_the_same_rows(whole, corpus):
    """Against a model of its own, loaded with the weights of the checkpoint at the switch."""
    run, found = _staged(corpus, whole), events(whole, "switch")
    assert [event["step"] for event in found] == list(SWITCHES)
    for index, event in enumerate(found):
        before, after = run.stages[index], run.stages[index + 1]
        rows = heldout_rows(Corpus.open(corpus), seq_len=before.seq_len, rows=run.evaluation.rows)
        model = Transformer(run.model, before.attention.per_layer(2), before.rope)
        load_into(model, whole / "checkpoints" / f"step_{event['step']:08d}")
        expected = []
        for stage in (before, after):
            model.set_attention(stage.attention.per_layer(2))
            model.set_rope(stage.rope)
            with torch.no_grad():
                sums = [
                    model(row.tokens.flatten(), row.positions.flatten(), row.cu_seqlens, row.labels.flatten()).sum().item() for row in rows
                ]
            expected.append(sum(sums) / rows[0].step_targets)
        assert (event["loss_before"], event["loss_after"]) == pytest.approx(expected, rel=1e-6)
        assert event["loss_before"] != event["loss_after"] and event["stage"] == STAGES[index + 1]


def test_a_switch_that_changes_nothing_is_none(corpus, ranks, tmp_path):
    """So weights, moments, schedule and stream go through a switch untouched."""
    run = make_run(corpus, tmp_path / "one")
    train(run, ranks)
    half = replace(run.stages[0], tokens=4 * STEP)
    train(replace(run, run_dir=str(tmp_path / "two"), stages=(half, replace(half, name="again"))), ranks)
    assert steps(tmp_path / "two") == steps(tmp_path / "one")
    (switch,) = events(tmp_path / "two", "switch")
    assert switch["loss_before"] == switch["loss_after"]


# --- branches ------------------------------------------------------------------------------------------------------------------------

PEAK, FLOOR = 1e-3, 1e-4
WSD = ("optim=adamw_wsd", f"optim.warmup_tokens={2 * STEP}", f"optim.decay_tokens={4 * STEP}")


def _rates(run_dir: Path) -> list[float]:
    return [line["lr"] for line in lines(run_dir) if "event" not in line]


@pytest.fixture(scope="module")
def stable(corpus, ranks, tmp_path_factory) -> Path:
    """The checkpoints of a run planned for 40 steps, of which 6 are done: warm-up, then flat."""
    folder = tmp_path_factory.mktemp("stable") / "run"
    train(make_run(corpus, folder, *WSD, *EVERYTHING_KEPT, f"stages.0.tokens={40 * STEP}", "max_steps=6"), ranks)
    assert _rates(folder) == [PEAK / 2, *[PEAK] * 5]
    return folder / "checkpoints"


def test_a_decay_branches_off_a_checkpoint_as_if_the_run_had_been_planned_so(stable, corpus, ranks, tmp_path):
    train(make_run(corpus, tmp_path / "planned", *WSD), ranks)  # eight steps, the last four decay
    train(make_run(corpus, tmp_path / "branch", *WSD, f"resume={stable / 'step_00000004'}"), ranks)
    assert steps(tmp_path / "branch") == steps(tmp_path / "planned")[4:]
    assert _rates(tmp_path / "branch") == _rates(tmp_path / "planned")[4:]
    assert _rates(tmp_path / "branch") == pytest.approx([PEAK - (PEAK - FLOOR) * part for part in (0.25, 0.5, 0.75, 1.0)])


def test_the_length_of_a_decay_is_chosen_where_it_branches(stable, corpus, ranks, tmp_path):
    short = (f"optim.decay_tokens={2 * STEP}", f"stages.0.tokens={8 * STEP}", f"resume={stable / 'step_00000006'}")
    train(make_run(corpus, tmp_path / "short", *WSD, *short), ranks)
    assert _rates(tmp_path / "short") == pytest.approx([(PEAK + FLOOR) / 2, FLOOR])
    later = (f"stages.0.tokens={9 * STEP}", f"resume={stable / 'step_00000003'}", "max_steps=6")
    train(make_run(corpus, tmp_path / "later", *WSD, *later), ranks)  # stays flat up to its own decay
    assert _rates(tmp_path / "later") == pytest.approx([PEAK, PEAK, PEAK - (PEAK - FLOOR) / 4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [f"stages.0.tokens={8 * STEP}"],
            r"step 6 was trained at a learning rate of 0.001, this schedule has 0.00055 at its 3072 tokens, and 1024 are left: "
            r"set optim.decay_tokens to at most 1024",
        ),
        (
            [f"stages.0.tokens={100 * STEP}", "optim.warmup_tokens=0", "optim.warmup_fraction=0.1"],
            r"this schedule has 0.0006 at its 3072 tokens, .* its warm-up lasts 5120 tokens; give optim.warmup_tokens",
        ),
    ],
)
def test_a_branch_whose_learning_rate_would_drop_is_refused(stable, corpus, ranks, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(make_run(corpus, tmp_path / "run", *WSD, f"resume={stable / 'step_00000006'}", *changes), ranks)
    assert not (tmp_path / "run").exists()


# --- micro-batches --------------------------------------------------------------------------------------------------------------------


def test_each_stage_takes_the_rows_that_fit(corpus, ranks, tmp_path, monkeypatch):
    shapes = []
    plain = Engine.micro_step

    def micro_step(self, batch, *, weight, last):
        shapes.append(tuple(batch.tokens.shape))
        return plain(self, batch, weight=weight, last=last)

    monkeypatch.setattr(Engine, "micro_step", micro_step)
    run = make_run(corpus, tmp_path / "run", "parallel.micro_batch_tokens=300")  # two rows of 128, one of 256 or 512
    short = replace(run.stages[0], tokens=STEP)
    stages = (short, replace(short, name="longer", seq_len=256), replace(short, name="longest", seq_len=512))
    train(replace(run, stages=stages), ranks)
    assert shapes == [(1, 512), (2, 128), (2, 128), (1, 256), (1, 256), (1, 512)]  # the dry run first, with the largest
    assert [step for step, _, _ in steps(tmp_path / "run")] == [1, 2, 3]
