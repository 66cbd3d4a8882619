"""AdamW's groups and the learning rate."""

import itertools
from dataclasses import replace

import pytest

from configs.registry import compose
from configs.schema import ConfigError, OptimConfig, RunConfig, ScheduleKind
from model.transformer import Transformer
from train.optim import build_optimizer, learning_rate


def _model(*overrides: str) -> Transformer:
    run = compose(RunConfig, config_name="train", overrides=["model=tiny", *overrides])
    return Transformer(run.model, run.stages[0].attention.per_layer(2), run.stages[0].rope)


@pytest.mark.parametrize("schedule", list(ScheduleKind))
def test_the_learning_rate_warms_up_and_ends_where_it_should(schedule):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_fraction=0.1, decay_fraction=0.2, min_lr_ratio=0.1)
    rates = [learning_rate(config, tokens, 1000) for tokens in range(0, 1001, 10)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.5) and rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0 if schedule is ScheduleKind.CONSTANT else 0.1)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rates[10:]))
    if schedule is ScheduleKind.WSD:
        assert rates[80] == pytest.approx(1.0) and rates[90] == pytest.approx(0.55)


def test_the_first_step_moves_the_weights_and_the_last_is_at_the_floor():
    config = OptimConfig(lr=1.0, warmup_fraction=0.4, min_lr_ratio=0.1)
    rates = [learning_rate(config, tokens, 1000) for tokens in range(100, 1001, 100)]  # of the ten steps of a run
    assert rates[0] == pytest.approx(0.25) and rates[3] == max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)


def test_optimizer_groups_follow_the_families():
    config = OptimConfig()
    model = _model("model.qkv_bias=true", "model.qk_norm=true")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = ([names[id(parameter)] for parameter in group["params"]] for group in build_optimizer(model, config).param_groups)
    assert all("norm" not in name and "bias" not in name and "embedding" not in name for name in decayed)
    assert len(decayed) == 2 * 7 and "embedding.weight" in undecayed
    assert any("q_norm" in name for name in undecayed) and any(name.endswith("bias") for name in undecayed)
    everything = build_optimizer(model, replace(config, no_decay=()))
    assert [group["weight_decay"] for group in everything.param_groups] == [config.weight_decay]


def test_a_group_that_matches_nothing_is_refused():
    only_biases = OptimConfig(no_decay=("bias",))
    with pytest.raises(ConfigError, match=r"^optim.no_decay=\[bias\]: this model has no such parameter; it has embedding, norm$"):
        build_optimizer(_model(), only_biases)
    assert len(build_optimizer(_model("model.qkv_bias=true"), only_biases).param_groups) == 2
    assert len(build_optimizer(_model(), OptimConfig()).param_groups) == 2  # the default names biases too


def test_lengths_in_tokens_make_runs_of_other_lengths_alike():
    config = OptimConfig(lr=1.0, schedule=ScheduleKind.WSD, warmup_tokens=100, decay_tokens=200, min_lr_ratio=0.1)
    short, long = ([learning_rate(config, tokens, total) for tokens in range(0, total + 1, 10)] for total in (500, 7000))
    assert short[:31] == long[:31] and short[10:31] == [1.0] * 21  # warm-up and stable stretch, to the bit
    assert short[31:] == pytest.approx(long[-20:], rel=1e-12) and short[-1] == pytest.approx(0.1)
    shares = OptimConfig(lr=1.0, schedule=ScheduleKind.WSD, warmup_fraction=0.2, decay_fraction=0.4, min_lr_ratio=0.1)
    assert short == pytest.approx([learning_rate(shares, tokens, 500) for tokens in range(0, 501, 10)])
