"""The convolution over keys: against torch's own conv1d, documents apart, and what it leaves alone."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from configs.schema import AttentionConfig, OptimConfig, RopeConfig
from model.init import initialise
from model.layers import KeyConvolution
from tests.model.helpers import build, pack, tiny_config
from tests.model.ops.helpers import assert_error_within_twice
from train.optim import build_optimizer, parameter_family

LENGTHS = [1, 2, 17, 3, 1, 4]


def convolution(width: int, channels: int = 6, dtype: torch.dtype = torch.float64) -> KeyConvolution:
    module = KeyConvolution(channels, width).to(dtype)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    return module


def by_conv1d(module: KeyConvolution, k: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The formula, one document after the other, through torch's grouped convolution over zeros and the document."""
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        padded = functional.pad(k[start:end].t()[None], (module.width - 1, 0))
        # conv1d multiplies its last tap with the newest token; ours is the first.
        taps = module.weight.flip(0).t()[:, None]
        outputs.append(k[start:end] + functional.silu(functional.conv1d(padded, taps, groups=k.shape[1]))[0].t())
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", [LENGTHS, [1], [2, 2], [40]], ids=str)
@pytest.mark.parametrize("width", [3, 5])
def test_output_and_every_gradient_equal_conv1d(width, lengths):
    module, cu_seqlens = convolution(width), pack(lengths)[2]
    generator = torch.Generator().manual_seed(0)
    k, d_out = (torch.randn(sum(lengths), 6, dtype=torch.float64, generator=generator) for _ in range(2))
    k.requires_grad_()
    results = []
    for run in (module, lambda *inputs: by_conv1d(module, *inputs)):
        out = run(k, cu_seqlens)
        results.append([out, *torch.autograd.grad(out, (k, module.weight), d_out)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_by_hand():
    """One channel, weights 2, 3, 5 for lags 0, 1, 2; the second document begins at the third token."""
    module = KeyConvolution(1, 3).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[2.0], [3.0], [5.0]]))
    k = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [0.0]], dtype=torch.float64)
    sums = torch.tensor([[2.0], [23.0], [200.0], [2300.0], [3500.0]], dtype=torch.float64)
    assert torch.equal(module(k, torch.tensor([0, 2, 5], dtype=torch.int32)), k + functional.silu(sums))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_later_tokens_and_other_documents_change_no_bit(dtype):
    module, cu_seqlens = convolution(5, dtype=dtype), torch.tensor([0, 10, 30, 40], dtype=torch.int32)
    k = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = k.clone()
    other[:10] += 1
    other[25:] -= 1
    results = []
    for keys in (k, other):
        keys = keys.clone().requires_grad_()
        out = module(keys, cu_seqlens)
        results.append((out[10:25], torch.autograd.grad(out[10:25].sum(), keys)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1][10:25], results[1][1][10:25])
    for _, d_k in results:
        assert not d_k[:10].any() and not d_k[25:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    cu_seqlens = pack(LENGTHS)[2]
    k, d_out = torch.randn(2, sum(LENGTHS), 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = {}
    for name, run, of in (("ours", KeyConvolution.forward, dtype), ("plain", by_conv1d, dtype), ("exact", by_conv1d, torch.float64)):
        module, keys = convolution(5, dtype=dtype).to(of), k.to(of).requires_grad_()
        out = run(module, keys, cu_seqlens)
        d_k, d_weight = torch.autograd.grad(out, (keys, module.weight), d_out.to(of))
        results[name] = {"out": out.detach(), "d_k": d_k, "d_weight": d_weight}
    assert all(x.dtype == dtype for x in results["ours"].values())
    assert_error_within_twice(results["ours"], results["plain"], results["exact"])


# --- in the model --------------------------------------------------------------------------------------------------------------------


def test_it_changes_nothing_at_first_and_learns_from_the_first_step():
    plain, convolved = build(tiny_config()), build(tiny_config(key_conv=3))
    initialise(convolved, convolved.config, 0)
    inputs = pack([20, 9])
    assert torch.equal(plain(*inputs), convolved(*inputs))
    convolved(*inputs, inputs[0]).sum().backward()
    for layer in convolved.layers:
        assert (layer.attention.key_conv.weight.grad.abs() > 0).all()


def test_it_acts_before_the_norm_of_keys_and_before_rope():
    config = tiny_config(key_conv=3, qk_norm=True)
    model = build(config)
    attention = model.layers[0].attention
    x, cu_seqlens = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 12], dtype=torch.int32)
    expected = attention.k_norm(attention.key_conv(attention.k_proj(x), cu_seqlens).unflatten(-1, (-1, 16)))
    seen = {}
    attention.k_norm.register_forward_hook(lambda module, inputs, output: seen.update(normed=output))
    attention(x, None, cu_seqlens, model.attention[0], "auto", model.workspace)
    assert torch.equal(seen["normed"], expected)


def test_scores_depend_on_the_distance_alone():
    """As without a convolution: where in the row a document's positions begin must not matter to a full layer."""
    model = build(tiny_config(key_conv=5)).double()
    tokens, positions, cu_seqlens = pack([40])
    torch.testing.assert_close(model(tokens, positions + 50, cu_seqlens), model(tokens, positions, cu_seqlens), rtol=1e-4, atol=1e-4)


def test_every_layer_has_it_whatever_its_attention():
    config = tiny_config(key_conv=3)
    names = [f"layers.{layer}.attention.key_conv.weight" for layer in range(2)]
    for rule in ("full", "moba(8, 2)", "last 1 sliding(8), rest full"):
        model = build(config, rule)
        assert [name for name in model.state_dict() if "key_conv" in name] == names
        assert model.layers[0].attention.key_conv.weight.shape == (3, 2 * 16)
    assert not [name for name in build(tiny_config()).state_dict() if "key_conv" in name]


def test_its_weights_decay_like_matrices():
    model = build(tiny_config(key_conv=3))
    weight = model.layers[0].attention.key_conv.weight
    assert parameter_family("layers.0.attention.key_conv.weight", weight) == "matrix"
    decayed, undecayed = build_optimizer(model, OptimConfig()).param_groups
    assert any(parameter is weight for parameter in decayed["params"]) and decayed["weight_decay"] > 0
    assert not any(parameter is weight for parameter in undecayed["params"])


def test_initialisation_sets_it_to_zero():
    model = build(tiny_config(key_conv=3))
    assert all(layer.attention.key_conv.weight.all() for layer in model.layers)
    initialise(model, model.config, 0)
    assert not any(layer.attention.key_conv.weight.any() for layer in model.layers)


def test_switches_of_attention_and_positions_leave_the_weights_alone():
    model, inputs = build(tiny_config(key_conv=5)), pack([37, 1, 64])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = model(*inputs).detach()
    seen = [first]
    for rule in ("sliding(8)", "moba(8, 2)", "every 2 moba(8, 2), rest sliding(16)"):
        model.set_attention(AttentionConfig(rule=rule).per_layer(2))
        for nope in ("", "every 2"):
            model.set_rope(RopeConfig(nope=nope))
            seen.append(model(*inputs).detach())
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    model.set_attention(AttentionConfig(rule="full").per_layer(2))
    model.set_rope(RopeConfig())
    assert torch.equal(model(*inputs), first)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())
