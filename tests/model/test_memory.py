"""Bytes reckoned from shapes against what PyTorch keeps and allocates in a real forward and backward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.schema import ActivationConfig, AttentionConfig, LossBackend, ModelConfig
from model import memory
from model.memory import PassBytes, effective, pass_bytes
from model.ops.loss import tiled
from model.transformer import Transformer
from tests.model.helpers import build, tiny_config
from train.calibrate import kept_bytes

ROW = 512
DTYPES = {torch.float32: 4, torch.bfloat16: 2}


def _config(**changes: object) -> ModelConfig:
    sizes = {"vocab_size": 512, "hidden_size": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "ffn_size": 384}
    return ModelConfig(**{**sizes, **changes})


def _model(config: ModelConfig, rule: str, dtype: torch.dtype, ffn_tile: int = 0) -> Transformer:
    return build(config, rule, backend="torch", ffn_tile=ffn_tile).to(dtype)


def _inputs(rows: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.arange(rows * ROW) % vocab_size
    return tokens, torch.arange(ROW).repeat(rows), torch.arange(0, rows * ROW + 1, ROW, dtype=torch.int32)


def _reckoned(
    config: ModelConfig, rule: str, rows: int, dtype: torch.dtype, ffn_tile: int = 0, kept: str = "none", gpu: bool = False
) -> PassBytes:
    attention, activation = (
        AttentionConfig(rule=rule).per_layer(config.num_layers),
        ActivationConfig(rule=kept).per_layer(config.num_layers),
    )
    sizes = {"rows": rows, "seq_len": ROW, "itemsize": DTYPES[dtype], "ffn_tile": ffn_tile}
    return pass_bytes(config, attention, activation, gpu=gpu, triton_workspace=0, **sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("rule", ["full", "moba(64, 3)", "last 1 full, rest moba(64, 4)", "moba(256, 2)", "every 2 full, rest sliding(64)"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "qkv_bias": True, "num_kv_heads": 4, "key_conv": 3}])
def test_activations_are_what_autograd_saves(changes, rule, rows, dtype):
    config = _config(**changes)
    model = _model(config, rule, dtype)
    saved = kept_bytes(model, lambda: model.hidden(*_inputs(rows, config.vocab_size)))
    assert _reckoned(config, rule, rows, dtype).activations == pytest.approx(saved, rel=1e-3)


@pytest.mark.parametrize("kept", ["none", "selective", "full"])
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_that_no_kernel_fuses_keeps_its_weights(monkeypatch, rows, kept):
    """By how much more than the fused one: on a GPU it is what PyTorch takes in fp32 for query heads that share keys."""
    config = _config(key_conv=3)
    model = _model(config, "full", torch.float32)
    model.set_activation(ActivationConfig(rule=kept).per_layer(config.num_layers))

    def saved() -> int:
        return kept_bytes(model, lambda: model.hidden(*_inputs(rows, config.vocab_size)))

    fused = saved()
    with sdpa_kernel(SDPBackend.MATH):
        unfused = saved()
    reckoned = _reckoned(config, "full", rows, torch.float32, kept=kept, gpu=True)
    monkeypatch.setattr(memory._Shapes, "is_unfused", lambda self, attention: False)
    usual = _reckoned(config, "full", rows, torch.float32, kept=kept, gpu=True)
    assert unfused - fused == reckoned.activations - usual.activations


@pytest.mark.parametrize(("layers", "rows", "matrices"), [(1, 1, 4.019), (2, 1, 5.054), (8, 1, 11.266), (4, 2, 11.257)])
def test_the_peak_of_attention_that_no_kernel_fuses_is_what_was_measured(layers, rows, matrices):
    """On an H200 under torch 2.11, in matrices `[Hq, S, S]` of fp32."""
    config, length = tiny_config(num_kv_heads=1, max_seq_len=8192, num_layers=layers), 4096
    kinds = AttentionConfig(rule="full").per_layer(layers)
    sizes = {"rows": rows, "seq_len": length, "itemsize": 4, "gpu": True, "triton_workspace": 0}
    reckoned = pass_bytes(config, kinds, ("none",) * layers, **sizes).peak
    assert reckoned / (4 * config.num_heads * length**2) == pytest.approx(matrices, rel=0.02)


KEPT = ("selective", "full", "offload", "every 2 full, rest none", "last 1 selective, rest offload")


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("rule", ["full", "moba(64, 3)", "last 1 full, rest sliding(64)"])
def test_less_is_kept_where_layers_are_computed_again(rule, kept):
    """Of whatever holds it: autograd, checkpoints, host memory (which on a CPU is the device's)."""
    config = _config(key_conv=3)
    model = _model(config, rule, torch.float32)
    usual = _reckoned(config, rule, 2, torch.float32)
    model.set_activation(ActivationConfig(rule=kept).per_layer(config.num_layers))
    reckoned = _reckoned(config, rule, 2, torch.float32, kept=kept)
    held = kept_bytes(model, lambda: model.hidden(*_inputs(2, config.vocab_size)))
    assert reckoned.activations + reckoned.host == pytest.approx(held, rel=2e-3) and held < 0.75 * usual.activations
    row = 2 * ROW * 128 * 4
    assert reckoned.host == model.activation.count("offload") * row == sum(len(slot) for slot in model.host._free)


def _peak(config: ModelConfig, rule: str, dtype: torch.dtype, ffn_tile: int = 0, kept: str = "none") -> int:
    """Most bytes allocated at once during forward and backward, beyond weights and gradients, by PyTorch's own profiler."""
    model, inputs = _model(config, rule, dtype, ffn_tile), _inputs(2, config.vocab_size)
    model.set_activation(ActivationConfig(rule=kept).per_layer(config.num_layers))
    model(*inputs, inputs[0]).sum().backward()  # gradients are there from now on
    with torch.profiler.profile(profile_memory=True) as profile:
        model(*inputs, inputs[0]).sum().backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        top = max(top, level)
    return top


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("full", {"vocab_size": 8192}),  # the head's logits are most of it
        ("moba(64, 3)", {}),
        ("full", {"vocab_size": 32, "ffn_size": 1024}),  # the FFN's gradients are
        ("last 1 full, rest moba(64, 3)", {"vocab_size": 32, "ffn_size": 512}),
        ("moba(32, 12)", {"vocab_size": 32, "ffn_size": 256}),  # slots are
    ],
)
def test_the_peak_is_what_the_allocator_sees(rule, changes, dtype):
    config = _config(**changes)
    assert _reckoned(config, rule, 2, dtype).peak == pytest.approx(_peak(config, rule, dtype), rel=0.06)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_in_tiles_holds_the_logits_of_one(monkeypatch, dtype):
    config = _config(vocab_size=8192, num_layers=1)
    whole = _peak(config, "full", dtype)
    monkeypatch.setattr(tiled, "LOGITS_BYTES", DTYPES[dtype] * 8192 * 128)
    reckoned, peak = _reckoned(config, "full", 2, dtype), _peak(config, "full", dtype)
    copies = {torch.float32: 1, torch.bfloat16: 2}[dtype]  # of the logits in fp32
    head, d_x = 4 * 8192 * 128, DTYPES[dtype] * 2 * ROW * 128
    assert reckoned.logits == (DTYPES[dtype] + 4 * copies) * 8192 * 128 + head + d_x
    assert peak == pytest.approx(reckoned.peak, rel=0.06) and peak < whole / 2


@pytest.mark.parametrize(("tile", "dtype"), [(128, torch.float32), (512, torch.bfloat16)])
def test_a_feed_forward_in_tiles_holds_the_intermediates_of_one(tile, dtype):
    config = _config(vocab_size=32, ffn_size=2048)
    reckoned = _reckoned(config, "full", 2, dtype, tile)
    saved = kept_bytes(model := _model(config, "full", dtype, tile), lambda: model.hidden(*_inputs(2, 32)))
    assert reckoned.activations == pytest.approx(saved, rel=1e-3)
    peak = _peak(config, "full", dtype, tile)
    assert reckoned.peak == pytest.approx(peak, rel=0.06) and peak < _peak(config, "full", dtype) / 2
    assert _reckoned(config, "full", 2, dtype, 2 * ROW) == _reckoned(config, "full", 2, dtype)


def test_what_the_loss_holds_on_a_gpu():
    """The kernel makes nothing of the logits' size; plain torch their fp32 log-probabilities; without tiles there are all of them."""
    config, attention = _config(vocab_size=8192), AttentionConfig().per_layer(3)
    sizes = {"rows": 1, "seq_len": ROW, "itemsize": 2, "gpu": True, "triton_workspace": 1}
    held = {loss: pass_bytes(config, attention, ["none"] * 3, loss=loss, **sizes).logits for loss in LossBackend}
    assert held[LossBackend.AUTO] == 2 * ROW * 8192 + 4 * 8192 * 128 + 2 * ROW * 128
    assert held[LossBackend.TRITON] == held[LossBackend.AUTO] and held[LossBackend.TORCH] == held[LossBackend.AUTO] + 4 * ROW * 8192
    assert held[LossBackend.REFERENCE] == 12 * ROW * 8192


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("rule", ["full", "moba(64, 3)"])
def test_the_peak_where_layers_are_computed_again(rule, kept):
    """Host memory is there before and after."""
    config = _config(vocab_size=32, ffn_size=512, num_layers=4)
    assert _reckoned(config, rule, 2, torch.float32, kept=kept).peak == pytest.approx(
        _peak(config, rule, torch.float32, kept=kept), rel=0.06
    )


def test_moba_that_sees_the_whole_row_is_reckoned_as_full():
    (moba,) = AttentionConfig(rule="moba(128, 4)").per_layer(1)
    assert str(effective(moba, 512)) == "full" and effective(moba, 513) is moba
    assert _reckoned(_config(), "moba(128, 4)", 1, torch.float32) == _reckoned(_config(), "full", 1, torch.float32)


def test_on_a_gpu_by_hand():
    """bf16, one layer: two norms with input and output, the FFN's four, q, k, v and output, log-sum-exp and 1/rms in fp32, chosen ids."""
    config = _config(num_layers=1)
    attention = AttentionConfig(rule="moba(64, 3)").per_layer(1)
    held = pass_bytes(config, attention, ["none"], rows=1, seq_len=ROW, itemsize=2, gpu=True, triton_workspace=1 << 30)
    layer = 2 * (4 * 128 + 4 * 384 + 2 * 128 + 2 * 64) + 4 * (2 + 4) + 4 * 4 * 2
    assert held.activations == ROW * (layer + 2 * 2 * 128 + 4 + 8 + 4 * 32)
    slots, means_and_ids = 4 * ROW * 2 * (32 * 2 + 8), 4 * (ROW * 64 // 64) + 4 * 4 * ROW * 2
    assert held.gate_and_slots == slots + means_and_ids
    less = pass_bytes(config, attention, ["none"], rows=1, seq_len=ROW, itemsize=2, gpu=True, triton_workspace=slots // 2)
    assert less.gate_and_slots == slots // 2 + means_and_ids


def test_what_sorts_the_chosen_is_reckoned_where_it_is_more_than_their_partial_results():
    """Of one head at a time: ids and keys of 64 slots for 2^20 tokens, and counts of 2^14 blocks in chunks of 64 tokens."""
    config, (moba,) = _config(num_layers=1), AttentionConfig(rule="moba(64, 64)").per_layer(1)
    sizes = {"rows": 1, "seq_len": 1 << 20, "itemsize": 2, "gpu": True, "triton_workspace": 1 << 30}
    index = 4 * ((1 << 20) * (63 + 64) + (1 << 14) * ((1 << 14) + 1))
    assert index > 1 << 30
    means_and_ids = 4 * ((1 << 20) * 64 // 64) + 4 * 4 * (1 << 20) * 63
    assert pass_bytes(config, [moba], ["none"], **sizes).gate_and_slots == index + means_and_ids
    two = pass_bytes(config, [moba], ["none"], sequence_parallel=2, **sizes)
    assert two.gate_and_slots == index + means_and_ids // 2


@pytest.mark.parametrize(("seq_len", "itemsize", "copies"), [(2048, 2, 0), (4096, 2, 1), (2048, 4, 1)])
def test_rows_of_full_attention_are_joined_on_a_gpu_where_they_go_one_by_one(seq_len, itemsize, copies):
    """FlashAttention takes all short rows at once; cuDNN, and PyTorch's fused kernel for fp32, take one."""
    config = _config(num_layers=1, num_kv_heads=4)
    full = AttentionConfig().per_layer(1)
    one, two = (
        pass_bytes(config, full, ["none"], rows=rows, seq_len=seq_len, itemsize=itemsize, gpu=True, triton_workspace=0).activations
        for rows in (1, 2)
    )
    assert two - 2 * one == copies * itemsize * 2 * seq_len * 4 * 32
