"""Rotary positions: every form of scaling against transformers' own functions, the rotation, and settings that are refused."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configs.checks import check_run
from configs.schema import AttentionConfig, ConfigError, ModelConfig, RopeConfig, RopeScaling, RunConfig, StageConfig
from model.rope import attention_factor, frequencies, rotary_table, rotate

LINEAR, NTK, YARN, LLAMA3 = RopeScaling.LINEAR, RopeScaling.NTK, RopeScaling.YARN, RopeScaling.LLAMA3


def theirs(head_dim: int, theta: float, length: int, kind: str, seq_len: int | None = None, **parameters: object):
    """Frequencies and attention factor as transformers computes them."""
    rope = {"rope_type": kind, "rope_theta": theta, **parameters}
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=length, rope_parameters=rope)
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len)


def assert_equal(rope: RopeConfig, head_dim: int, expected: tuple[torch.Tensor, float]) -> None:
    """To a few units of fp32 rounding: two ways to write a power or a blend."""
    ours = frequencies(head_dim, rope)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected[0], rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(expected[1], rel=1e-12)
    assert not torch.equal(ours, frequencies(head_dim, RopeConfig(theta=rope.theta)))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("factor", [1.5, 4.0, 40.0])
@pytest.mark.parametrize("length", [512, 4096, 32768])
def test_frequencies_equal_transformers(length, factor, theta, head_dim):
    shape = (head_dim, theta, length)
    assert_equal(RopeConfig(theta=theta, scaling=LINEAR, factor=factor), head_dim, theirs(*shape, "linear", factor=factor))

    # Their dynamic form at the length where the base is changed by just this factor: 2 · seq_len / length - 1.
    seq_len = length * (factor + 1) / 2
    assert_equal(RopeConfig(theta=theta, scaling=NTK, factor=factor), head_dim, theirs(*shape, "dynamic", seq_len, factor=2.0))

    stretched = {"theta": theta, "factor": factor, "original_max_seq_len": length}
    same = {"factor": factor, "original_max_position_embeddings": length}
    assert_equal(RopeConfig(scaling=YARN, **stretched), head_dim, theirs(*shape, "yarn", **same))
    ramp = {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25}
    assert_equal(RopeConfig(scaling=YARN, **stretched, **ramp), head_dim, theirs(*shape, "yarn", **same, **ramp))
    for low, high in ((1.0, 4.0), (0.5, 8.0)):
        bounds = {"low_freq_factor": low, "high_freq_factor": high}
        assert_equal(RopeConfig(scaling=LLAMA3, **stretched, **bounds), head_dim, theirs(*shape, "llama3", **same, **bounds))


@pytest.mark.parametrize(("scaling", "kind"), [(YARN, "yarn"), (LLAMA3, "llama3")])
def test_interpolation_divides_what_a_released_model_has(scaling, kind):
    found, factor = theirs(
        64, 5e5, 8192, kind, factor=8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    rope = RopeConfig(theta=5e5, scaling=scaling, factor=8.0, original_max_seq_len=8192, interpolation=2.0)
    assert_equal(rope, 64, (found / 2, factor))


def test_ntk_divides_the_slowest_pair_by_the_factor_and_leaves_the_fastest():
    plain, ntk = (frequencies(64, rope) for rope in (RopeConfig(), RopeConfig(scaling=NTK, factor=8.0)))
    assert ntk[0] == plain[0] and plain[-1] / ntk[-1] == pytest.approx(8.0, rel=1e-5)


@pytest.mark.parametrize("rope", [RopeConfig(theta=500.0), RopeConfig(scaling=YARN, factor=4.0, original_max_seq_len=64)])
def test_the_table_holds_cos_and_sin_of_the_angles(rope):
    positions = torch.tensor([0, 3, 100])
    cos, sin = rotary_table(positions, 16, rope)
    assert cos.shape == sin.shape == (3, 1, 8) and cos.dtype == torch.float32
    angle = positions[:, None].double() * frequencies(16, rope).double()
    scale = 0.1 * math.log(4) + 1 if rope.scaling is YARN else 1.0
    torch.testing.assert_close(cos[:, 0].double(), angle.cos() * scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[:, 0].double(), angle.sin() * scale, rtol=0, atol=1e-5)


def test_linear_scaling_is_a_division_of_positions():
    x = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0))
    stretched = rotary_table(torch.arange(0, 16, 4), 16, RopeConfig(scaling=LINEAR, factor=4.0))
    assert torch.equal(rotate(x, stretched), rotate(x, rotary_table(torch.arange(4), 16, RopeConfig())))


# --- settings ------------------------------------------------------------------------------------------------------------------------

GOOD = {
    LINEAR: {"factor": 2.0},
    NTK: {"factor": 2.0},
    YARN: {"factor": 2.0, "original_max_seq_len": 4096},
    LLAMA3: {"factor": 2.0, "original_max_seq_len": 4096},
}


@pytest.mark.parametrize(
    ("scaling", "change", "message"),
    [
        (RopeScaling.NONE, {"factor": 2.0}, r"^factor=2.0: scaling=none has no use for it; leave it out$"),
        (LINEAR, {"interpolation": 2.0}, r"^interpolation=2.0: scaling=linear has no use for it"),
        (LLAMA3, {"interpolation": 0.5}, r"^interpolation=0.5: must be at least 1$"),
        (LINEAR, {"original_max_seq_len": 5}, r"^original_max_seq_len=5: scaling=linear has no use for it"),
        (NTK, {"beta_fast": 16.0}, r"^beta_fast=16.0: scaling=ntk has no use for it"),
        (YARN, {"low_freq_factor": 2.0}, r"^low_freq_factor=2.0: scaling=yarn has no use for it"),
        (LLAMA3, {"attention_factor": 1.0}, r"^attention_factor=1.0: scaling=llama3 has no use for it"),
        (LINEAR, {"factor": 1.0}, r"^factor=1.0: must be greater than 1 for scaling=linear$"),
        (YARN, {"factor": 0.5}, r"^factor=0.5: must be greater than 1 for scaling=yarn$"),
        (YARN, {"original_max_seq_len": 0}, r"^original_max_seq_len=0: scaling=yarn needs the length, .*at least 1$"),
        (LLAMA3, {"original_max_seq_len": -1}, r"^original_max_seq_len=-1: scaling=llama3 needs the length, .*at least 1$"),
        (YARN, {"attention_factor": -1.0}, r"^attention_factor=-1.0: must be at least 0$"),
        (YARN, {"beta_slow": 0.0}, r"^beta_slow=0.0: must be positive$"),
        (YARN, {"beta_fast": 1.0}, r"^beta_fast=1.0: must be greater than beta_slow=1.0$"),
        (LLAMA3, {"high_freq_factor": 0.5}, r"^high_freq_factor=0.5: must be greater than low_freq_factor=1.0$"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(scaling, change, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(scaling=scaling, **{**GOOD.get(scaling, {}), **change})


@pytest.mark.parametrize(
    ("rope", "rule", "longest"),
    [
        (RopeConfig(), "full", 1000),
        (RopeConfig(scaling=LINEAR, factor=2.5), "moba", 2500),
        (RopeConfig(scaling=NTK, factor=2.0), "full", 2000),
        (RopeConfig(scaling=YARN, factor=4.0, original_max_seq_len=1000), "full", 4000),
        (RopeConfig(scaling=LLAMA3, factor=8.0, original_max_seq_len=100), "full", 1000),
        (RopeConfig(scaling=LLAMA3, factor=8.0, original_max_seq_len=100, interpolation=2.0), "full", 2000),
        (RopeConfig(nope="every 2"), "every 2 moba, rest sliding(1001)", 1000),
        (RopeConfig(nope="last 1"), "last 2 moba, rest sliding(256)", 1000),
    ],
)
def test_a_stage_is_as_long_as_its_positions_reach(rope, rule, longest):
    fits = StageConfig(seq_len=longest, batch_tokens=longest, rope=rope, attention=AttentionConfig(rule=rule))
    run = RunConfig(model=ModelConfig(max_seq_len=1000), stages=(fits,))
    check_run(run, world_size=1)
    longer = replace(fits, seq_len=longest + 1, batch_tokens=longest + 1)
    with pytest.raises(ConfigError, match=rf"^stages.1.seq_len={longest + 1}: is beyond .* model.max_seq_len=1000") as caught:
        check_run(replace(run, stages=(fits, longer)), world_size=1)
    assert "\n" not in str(caught.value)
    assert (f"which stages.1.rope.scaling={rope.scaling.value} takes to {longest}" in str(caught.value)) == (longest > 1000)
    assert f"a factor of {math.ceil((longest + 1) / (rope.original_max_seq_len or 1000) / rope.interpolation)}," in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "rule"),
    [
        (RopeConfig(nope="all"), "full"),
        (RopeConfig(), "sliding(1000)"),
        (RopeConfig(nope="every 2"), "every 2 moba, rest sliding(256)"),
        (RopeConfig(scaling=LINEAR, factor=2.0), "sliding(2000)"),
    ],
)
def test_distances_within_reach_set_no_limit(rope, rule):
    stage = StageConfig(seq_len=1 << 20, batch_tokens=1 << 20, rope=rope, attention=AttentionConfig(rule=rule))
    check_run(RunConfig(model=ModelConfig(max_seq_len=1000), stages=(stage,)), world_size=1)


def test_a_list_of_layers_that_names_none_is_refused_with_its_stage():
    run = RunConfig(model=ModelConfig(num_layers=4), stages=(StageConfig(rope=RopeConfig(nope="layers 4")),))
    with pytest.raises(ConfigError, match=r"^stages.0.rope.nope='layers 4': layers \[4\] do not exist; the model has layers 0..3$"):
        check_run(run, world_size=1)
