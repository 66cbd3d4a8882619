"""Runs of models whose layers differ: windows with RoPE, MoBA without positions, convolved keys, and stages that change them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.schema import AttentionConfig, ConfigError, EvaluateConfig, ModelConfig, RopeConfig, RopeScaling, RunConfig, StageConfig
from tests.train.helpers import STEPS, events, load_weights, make_run, steps
from train.evaluate import attention_settings, context_lengths
from train.loop import train


def hybrid(corpus: Path, run_dir: Path, *more: str) -> RunConfig:
    """FlashMoBA's layers for half of the steps, then full attention with positions everywhere, stretched by YaRN."""
    run = make_run(corpus, run_dir, "attention.rule='every 2 moba, rest sliding(16)'", "rope.nope=every 2", "model.key_conv=3", *more)
    first = replace(run.stages[0], tokens=STEPS // 2 * 512)
    rope = RopeConfig(scaling=RopeScaling.YARN, factor=4.0, original_max_seq_len=128)
    second = replace(first, name="full", seq_len=512, attention=AttentionConfig(), rope=rope)
    return replace(run, stages=(first, second))


def test_it_learns_switches_and_resumes_to_the_bit(corpus, ranks, tmp_path):
    run = hybrid(corpus, tmp_path / "whole")
    train(run, ranks)
    (switch,) = events(tmp_path / "whole", "switch")
    assert switch["step"] == STEPS // 2 and switch["loss_before"] != switch["loss_after"]
    weights = load_weights(tmp_path / "whole/checkpoints/step_00000008")
    convolutions = [weight for name, weight in weights.items() if "key_conv" in name]
    assert len(convolutions) == 2 and all(weight.any() for weight in convolutions)  # they began at 0

    for last in (3, STEPS // 2, 0):
        train(replace(run, run_dir=str(tmp_path / "broken"), max_steps=last), ranks)
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")


@pytest.mark.parametrize("stage", [0, 3])
def test_every_zero_stage_trains_it_alike(corpus, ranks, tmp_path, stage):
    """ZeRO 3 takes weights away between the passes: what a backward pass of our own keeps must still be there."""
    found = []
    for number in (1, stage):
        train(hybrid(corpus, tmp_path / str(number), f"parallel=zero{number}"), ranks)
        found.append(load_weights(tmp_path / str(number) / "checkpoints/step_00000008"))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rope", "rule", "tried", "longest"),
    [
        (RopeConfig(), "full", "", 1000),
        (RopeConfig(scaling=RopeScaling.LINEAR, factor=2.0), "full", "", 2000),
        (RopeConfig(), "sliding(64)", "", None),
        (RopeConfig(), "sliding(64)", "full", 1000),  # of all the settings that are tried the strictest counts
        (RopeConfig(nope="every 2"), "every 2 moba, rest sliding(64)", "every 2 full, rest sliding(64)", None),
    ],
)
def test_evaluation_goes_as_far_as_positions_reach(rope, rule, tried, longest):
    stage = StageConfig(rope=rope, attention=AttentionConfig(rule=rule), seq_len=512)
    run = RunConfig(model=ModelConfig(max_seq_len=1000), stages=(stage,))

    def contexts(context: int) -> tuple[int, ...]:
        config = EvaluateConfig(checkpoint="x", contexts=(context,), attentions=(rule, tried) if tried else ())
        return context_lengths(config, run, stage, attention_settings(config, run, stage))

    assert contexts(longest or 1 << 20) == (longest or 1 << 20,)
    if longest:
        with pytest.raises(ConfigError, match=rf"^contexts={longest + 1}: is beyond the {longest} tokens .* under {tried or rule}"):
            contexts(longest + 1)
