"""The head's cross-entropy: every backend against the specification, with every weight that autograd may send back for a token."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model.ops.loss import BACKENDS, IGNORE, linear_cross_entropy, tiled
from model.ops.loss.rows import torch_rows
from tests.model.ops.helpers import LargestTensor, assert_all_close, assert_error_within_twice

TILE, VOCABULARY, HIDDEN = 10, 50, 16
SIZES = [1, TILE, 3 * TILE + 7]


@dataclass(frozen=True, kw_only=True)
class Target:
    backend: str
    device: str
    dtype: torch.dtype


@pytest.fixture(
    params=[
        pytest.param(Target(backend="torch", device="cpu", dtype=torch.float64), id="fp64"),
        pytest.param(Target(backend="torch", device="cpu", dtype=torch.float32), id="fp32"),
        pytest.param(Target(backend="torch", device="cpu", dtype=torch.bfloat16), id="bf16"),
        pytest.param(Target(backend="triton", device="cpu", dtype=torch.float32), id="interpreted"),
        *(
            pytest.param(Target(backend=backend, device="cuda", dtype=dtype), id=f"{backend}-{name}", marks=pytest.mark.gpu)
            for backend in ("torch", "triton", "liger")
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        ),
    ]
)
def target(request, monkeypatch) -> Target:
    """What computes the loss, where and in which dtype, in tiles of `TILE` tokens."""
    chosen = request.param
    if chosen.device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if chosen.backend == "liger" and importlib.util.find_spec("liger_kernel") is None:
            pytest.skip("liger_kernel is not installed")
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    elif chosen.backend == "triton":
        if torch.cuda.is_available():
            pytest.skip("the kernel is compiled for the CUDA device")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(tiled, "LOGITS_BYTES", TILE * VOCABULARY * chosen.dtype.itemsize)
    return chosen


def draw(num_tokens: int, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, labels, and a weight for each token, of which some are 0; the tokens of the second tile and some others are masked."""
    generator = torch.Generator().manual_seed(num_tokens)
    x, weight = (torch.randn(size, HIDDEN, generator=generator, dtype=torch.float64) for size in (num_tokens, VOCABULARY))
    labels = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    labels[TILE : 2 * TILE] = IGNORE
    labels[3::7] = IGNORE
    weights = torch.randn(num_tokens, generator=generator, dtype=torch.float64).clamp(min=-0.5)
    weights[::5] = 0
    x, weight = (tensor.to(target.device, target.dtype).requires_grad_() for tensor in (x, weight))
    return x, weight, labels.to(target.device), weights.to(target.device)


def results(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | float, backend: str) -> dict[str, Tensor]:
    """Losses, and the gradients of Σ weights · losses; of one number it is the sum that is scaled, as training does."""
    losses = linear_cross_entropy(x, weight, labels, backend=backend)
    total = losses.sum() * weights if isinstance(weights, float) else (losses * weights.to(losses.dtype)).sum()
    d_x, d_weight = torch.autograd.grad(total, (x, weight))
    return {"losses": losses.detach(), "d_x": d_x, "d_weight": d_weight}


def compare(target: Target, inputs: tuple[Tensor, Tensor, Tensor], weights: Tensor | float) -> None:
    """Against fp64: to rounding in fp64 and fp32; in bf16 with at most twice the error of the logits written out in bf16."""
    x, weight, labels = inputs
    found = results(x, weight, labels, weights, target.backend)
    exact = results(x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels, weights, "reference")
    assert found["losses"].dtype == torch.promote_types(target.dtype, torch.float32)
    assert {found["d_x"].dtype, found["d_weight"].dtype} == {target.dtype}
    if target.dtype is torch.bfloat16:
        assert_error_within_twice(found, results(x, weight, labels, weights, "reference"), exact)
    else:
        atol = 1e-11 if target.dtype is torch.float64 else 3e-5
        assert_all_close({name: tensor.double() for name, tensor in found.items()}, exact, atol=atol)


@pytest.mark.parametrize("num_tokens", SIZES)
def test_losses_and_gradients_under_any_weights(target, num_tokens):
    *inputs, weights = draw(num_tokens, target)
    for given in (1.0, 0.37, weights):
        compare(target, tuple(inputs), given)


def test_wide_and_extreme_logits(target):
    """More words than a program's block holds, in a number that nothing divides; and tokens that are all but certain."""
    vocabulary = 8192 + 77
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(3, HIDDEN, dtype=torch.float64)
    weight = torch.randn(vocabulary, HIDDEN, generator=generator, dtype=torch.float64)
    weight[11, 0], weight[8200, 1], weight[5, 2] = 30.0, 14.0, 90.0
    labels = torch.tensor([11, 8200, 6])
    inputs = [tensor.to(target.device, target.dtype).requires_grad_() for tensor in (x, weight)]
    compare(target, (*inputs, labels.to(target.device)), 1.0)


def test_all_tokens_masked(target):
    x, weight, labels, weights = draw(25, target)
    for given in (1.0, weights):
        found = results(x, weight, labels.fill_(IGNORE), given, target.backend)
        assert not any(tensor.any() or tensor.isnan().any() for tensor in found.values())


def test_a_logit_that_is_not_finite_shows(target):
    for value in (float("nan"), float("inf")):
        x, weight, labels, _ = draw(12, target)
        with torch.no_grad():
            x[5] = value
        losses = linear_cross_entropy(x, weight, labels, backend=target.backend)
        assert not losses[5].isfinite() and losses[6:9].isfinite().all()


# --- what it costs ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cpu(monkeypatch) -> Target:
    monkeypatch.setattr(tiled, "LOGITS_BYTES", TILE * VOCABULARY * 4)
    return Target(backend="torch", device="cpu", dtype=torch.float32)


@pytest.fixture
def sweeps(monkeypatch) -> list[bool]:
    """Whether each tile of logits that was computed became a gradient."""
    seen = []

    def rows(logits, labels, *, ignore, gradients):
        seen.append(gradients)
        return torch_rows(logits, labels, ignore=ignore, gradients=gradients)

    monkeypatch.setattr("model.ops.loss.api.torch_rows", rows)
    return seen


def test_logits_are_computed_once_in_training_and_alone_without_gradients(cpu, sweeps):
    x, weight, labels, weights = draw(4 * TILE, cpu)
    results(x, weight, labels, 0.5, "torch")
    assert sweeps == [True] * 4
    sweeps.clear()
    results(x, weight, labels, weights, "torch")
    assert sweeps == [True] * 8  # tokens that weigh differently ask for a second sweep
    sweeps.clear()
    with torch.no_grad():
        linear_cross_entropy(x, weight, labels)
    linear_cross_entropy(x.detach(), weight.detach(), labels)
    assert sweeps == [False] * 8


def test_a_second_backward_pass_is_right_too(cpu):
    x, weight, labels, _ = draw(4 * TILE, cpu)
    loss = linear_cross_entropy(x, weight, labels).sum()
    first = torch.autograd.grad(loss * 2, (x, weight), retain_graph=True)
    first = [gradient.clone() for gradient in first]
    for once, again in zip(first, torch.autograd.grad(loss * 2, (x, weight)), strict=True):
        torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("uniform", [True, False])
def test_no_tensor_has_the_size_of_all_logits(cpu, uniform):
    x, weight, labels, weights = draw(40 * TILE, cpu)
    with LargestTensor() as largest:
        results(x, weight, labels, 0.5 if uniform else weights, "torch")
    assert largest.num_bytes == x.nbytes < 4 * len(x) * VOCABULARY / 3  # its gradient


def test_tiles_are_large_and_aligned():
    assert tiled.tile_tokens(128256, 2) == 8192
    assert tiled.tile_tokens(1 << 40, 2) == 1
    assert tiled.tile_tokens(128256, 4) * 128256 * 4 <= tiled.LOGITS_BYTES


# --- bad input -------------------------------------------------------------------------------------------------------------------------

ERRORS = {
    "shapes": ({"weight": torch.zeros(5, 3)}, r"x has shape \(4, 2\) and weight \(5, 3\); they must be"),
    "dtypes": ({"weight": torch.zeros(5, 2).double()}, "x has dtype torch.float32 and weight torch.float64"),
    "labels": ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels are torch.int64 \(3,\); they must be int64 \[N\] with N=4"),
    "backend": ({"backend": "cutlass"}, "backend='cutlass'; accepted: auto, reference, torch, triton, liger"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_wrong_inputs_are_named(error):
    change, message = ERRORS[error]
    good = {"x": torch.zeros(4, 2), "weight": torch.zeros(5, 2), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**good, **change})


def test_what_needs_a_gpu_says_so():
    x, weight, labels = torch.zeros(4, 2), torch.zeros(5, 2), torch.zeros(4, dtype=torch.int64)
    for backend in ("triton", "liger"):
        assert backend in BACKENDS
        with pytest.raises(ValueError, match=f"backend='{backend}': the device is cpu; accepted: cuda; backend='torch' takes others"):
            linear_cross_entropy(x, weight, labels, backend=backend)
