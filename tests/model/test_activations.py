"""What layers keep and what they compute again: the same loss and the same gradients to the bit, attention run once where it is kept, and
host memory that comes back."""

import gc
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import ActivationConfig, ConfigError
from model import host_memory
from model.activations import ATTENTION
from model.transformer import Transformer
from tests.model.helpers import build, pack, tiny_config

KEPT = ("selective", "full", "offload", "every 2 full, rest none", "last 1 selective, rest offload")
RULES = ("full", "moba(8, 2)", "every 2 moba(8, 2), rest sliding(16)")
ROWS = ([20, 1, 24], [9, 27, 9])


def _model(rule: str, kept: str, ffn_tile: int = 0, **changes: object) -> Transformer:
    config = tiny_config(num_layers=3, **changes)
    model = build(config, rule, nope="every 3", ffn_tile=ffn_tile)
    model.set_activation(ActivationConfig(rule=kept).per_layer(3))
    return model


def _accumulate(model: Transformer, rows=ROWS) -> dict[str, torch.Tensor]:
    """Losses, and every parameter's gradient summed over the rows."""
    losses = []
    for seed, lengths in enumerate(rows):
        tokens, *rest = pack(lengths, seed=seed)
        loss = model(tokens, *rest, tokens.roll(-1)).sum()
        loss.backward()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses)} | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"key_conv": 3, "qk_norm": True, "num_kv_heads": 4}], ids=["plain", "convolved"])
@pytest.mark.parametrize("rule", RULES)
def test_whatever_is_kept_losses_and_gradients_have_the_same_bits(rule, changes):
    expected = _accumulate(_model(rule, "none", **changes))
    for kept in KEPT:
        found = _accumulate(_model(rule, kept, **changes))
        assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == [], kept


@pytest.mark.parametrize("kept", ["selective", "full", "offload"])
def test_a_tiled_feed_forward_is_not_computed_again_for_an_output_that_nothing_reads(kept, monkeypatch):
    tiles, plain = [], torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: tiles.append(len(x)) or plain(x))
    expected = _accumulate(_model("moba(8, 2)", "none", ffn_tile=16))
    once = len(tiles)
    found = _accumulate(_model("moba(8, 2)", kept, ffn_tile=16))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(tiles) == 2 * once and once == 2 * 3 * 2 * 3  # forward and backward, layers, rows of 45 tokens, tiles of a row


class _Attention(TorchDispatchMode):
    """Every forward pass of an attention operator, by its name, with what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[torch.Tensor, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        if function.name() in ATTENTION:
            self.calls.append((function.name(), given))
        return given


@pytest.mark.parametrize(
    ("rule", "operator"),
    [
        ("full", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("moba(8, 2)", "moba::blocked_forward"),
        ("sliding(16)", "sliding::chunked_forward"),
    ],
)
def test_attention_runs_once_where_it_is_kept_and_chooses_the_same_where_not(rule, operator):
    for kept, runs in (("none", 1), ("selective", 1), ("full", 2), ("offload", 2)):
        with _Attention() as seen:
            _accumulate(_model(rule, kept), rows=[[40]])
        assert Counter(name for name, _ in seen.calls) == {operator: 3 * runs}, kept
        first, again = seen.calls[:3], seen.calls[3:]
        for (_, once), (_, twice) in zip(first, reversed(again)):  # output, log-sum-exp, chosen blocks
            assert all(torch.equal(*pair) for pair in zip(once, twice) if isinstance(pair[0], torch.Tensor))


def test_a_forward_pass_without_gradients_keeps_nothing():
    model = _model("moba(8, 2)", "offload")
    with torch.no_grad():
        model(*pack([40]))
    assert model.host._free == []


def test_host_memory_is_of_exact_size_and_used_again():
    model = _model("full", "offload")
    _accumulate(model)
    slots = {slot.data_ptr() for slot in model.host._free}
    assert [len(slot) for slot in model.host._free] == [45 * 32 * 4] * 3
    _accumulate(model)
    assert {slot.data_ptr() for slot in model.host._free} == slots
    _accumulate(model, rows=[[100]])  # a stage of longer rows: what is too small is given back
    assert [len(slot) for slot in model.host._free] == [100 * 32 * 4] * 3
    _accumulate(model, rows=[[20]])
    assert [len(slot) for slot in model.host._free] == [100 * 32 * 4] * 3


def test_a_graph_that_is_dropped_gives_its_host_memory_back():
    """And two graphs at a time do not touch each other's."""
    model = _model("full", "offload")
    first, second = (model(*pack([30], seed=seed)).sum() for seed in range(2))
    assert model.host._free == []
    first.backward()
    assert len(model.host._free) == 3
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    del second
    gc.collect()
    assert len(model.host._free) == 6
    model.zero_grad()
    model(*pack([30])).sum().backward()
    assert all(map(torch.equal, grads, (parameter.grad for parameter in model.parameters())))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", "'' does not end in what a layer keeps; accepted: none, selective, full, offload"),
        ("half", "'half' does not end in what a layer keeps"),
        ("every full", "'every' does not select layers"),
        ("last 4 full", r"layers \[0, 1\] of 6 are named by no clause; add 'rest none' or 'rest full'"),
        ("all full, rest none", "'rest none' names no layer that is still free"),
        ("layers 7 full, rest none", r"layers \[7\] do not exist; the model has layers 0..5"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_one_line(rule, message):
    with pytest.raises(ConfigError, match=f"^rule={rule!r}: .*{message}") as caught:
        ActivationConfig(rule=rule).per_layer(6)
    assert "\n" not in str(caught.value)


def test_rules():
    assert ActivationConfig(rule="Last 2 full, layers 0 none, rest offload").per_layer(5) == ("none", "offload", "offload", "full", "full")


def test_a_model_refuses_what_does_not_fit_it():
    model = _model("full", "none")
    with pytest.raises(ValueError, match=r"^activation names 2 layers; the model has num_layers=3$"):
        model.set_activation(("none", "full"))
    with pytest.raises(ValueError, match=r"^activation='some'; accepted: none, selective, full, offload$"):
        model.set_activation(("none", "full", "some"))


def test_page_locked_bytes_are_counted_while_they_live(monkeypatch):
    runtime = SimpleNamespace(cudaHostRegister=lambda address, size, flags: 0, cudaHostUnregister=lambda address: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    monkeypatch.setattr(host_memory, "page_locked", host_memory.PageLocked())
    gpu = torch.device("cuda")
    first, second = (host_memory.host_bytes(size, gpu) for size in (100, 50))
    del first
    third = host_memory.host_bytes(30, gpu)
    assert len(second) + len(third) == host_memory.page_locked.now == 80 and host_memory.page_locked.peak == 150
    host_memory.host_bytes(1000, torch.device("cpu"))
    assert host_memory.page_locked.peak == 150


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_offload_is_beside_computation_and_takes_the_device_little_memory():
    """bf16 rows of 32K tokens: the bits of `full`, at most three layers' inputs more than none, and copies while kernels run."""
    sizes = {
        "hidden_size": 1024,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 128,
        "ffn_size": 2816,
        "max_seq_len": 32768,
        "init_std": 0.02,
    }
    model = build(tiny_config(num_layers=8, **sizes), "moba(512, 3)").to("cuda", torch.bfloat16)
    tokens, positions, bounds = pack([32768])
    tokens, positions = tokens.cuda(), positions.cuda()
    row = 32768 * 1024 * 2

    def step() -> None:
        model.zero_grad(set_to_none=False)  # so that gradients take as much from the first layer's turn to the last's
        model(tokens, positions, bounds, tokens.roll(-1)).sum().backward()
        torch.cuda.synchronize()

    grads, held = {}, {}
    for kept in ("full", "offload"):
        model.set_activation((kept,) * 8)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        held[kept] = torch.cuda.max_memory_allocated()
        grads[kept] = [parameter.grad.cpu() for parameter in model.parameters()]
    assert all(map(torch.equal, grads["full"], grads["offload"]))
    assert held["full"] - held["offload"] >= (8 - 3) * row
    assert [len(slot) for slot in model.host._free] == [row] * 8 and all(slot.is_pinned() for slot in model.host._free)
    assert host_memory.page_locked.now >= 8 * row

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event for event in events if "Memcpy DtoH" in event.name or "Memcpy HtoD" in event.name]
    copies = [event for event in copies if event.time_range.elapsed_us() > 100]  # of 64 MiB, not of boundaries
    kernels = [event.time_range for event in events if "Mem" not in event.name]
    assert len(copies) == 16
    beside = [any(kernel.start < copy.time_range.end and copy.time_range.start < kernel.end for kernel in kernels) for copy in copies]
    assert sum(beside) >= 14  # the first to come back is waited for
