"""Inputs and comparisons of the operator tests."""

import itertools

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.ops.moba import select_blocks


def make_inputs(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, *, seed: int, dtype=torch.float64) -> list[Tensor]:
    """q, k, v `[T, H, D]`, contiguous leaves, and the gradient `[T, Hq, D]` that a loss sends back."""
    generator = torch.Generator().manual_seed(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    q, k, v, d_out = (torch.randn(num_tokens, h, head_dim, generator=generator, dtype=torch.float64).to(dtype) for h in heads)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out]


def with_dtype(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same numbers in another dtype, as fresh leaves."""
    *leaves, d_out = inputs
    return [*(x.detach().to(dtype).requires_grad_() for x in leaves), d_out.to(dtype)]


def forward_backward(attention, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Output and every gradient of `attention(q, k, v)`."""
    q, k, v, d_out = inputs
    out = attention(q, k, v)
    d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), d_out)
    return {"out": out.detach(), "d_q": d_q, "d_k": d_k, "d_v": d_v}


def cu_seqlens(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float) -> None:
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_error_within_twice(fast: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Measured tolerance: in root-mean-square the fast path is at most twice as far from the exact result as plain torch."""
    for name, truth in exact.items():
        fast_error, plain_error = ((x[name].double() - truth).norm() for x in (fast, plain))
        assert fast_error <= 2 * plain_error, name


def assert_largest_error_within_twice(fast: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The same for the worst element, plus 8 units of fp32 rounding of the largest value, as fp32's worst is one outlier."""
    for name, truth in exact.items():
        fast_error, plain_error = ((x[name].double() - truth).abs().max() for x in (fast, plain))
        assert fast_error <= 2 * plain_error + 8 * torch.finfo(torch.float32).eps * truth.abs().max(), name


def visible_tokens(q: Tensor, k: Tensor, bounds: list[int], block_size: int, topk: int) -> Tensor:
    """bool `[Hq, T, T]` from select_blocks."""
    chosen = select_blocks(q, k, block_size=block_size, topk=topk, cu_seqlens=cu_seqlens(bounds))
    visible = torch.zeros(q.shape[1], len(q), len(q), dtype=torch.bool, device=q.device)
    for start, end in itertools.pairwise(bounds):
        position = torch.arange(end - start, device=q.device)
        block = position // block_size
        is_seen = (block[:, None] == block) & (position[:, None] >= position)  # own block
        for nth in range(topk - 1):
            is_seen = is_seen | (chosen[start:end, :, nth].t()[..., None] == block)  # [Hq, L, L]
        visible[:, start:end, start:end] = is_seen
    return visible


def plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Masked attention as anyone writes it, all in the inputs' own dtype."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.transpose(0, 1), *(x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    return (scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v).transpose(0, 1)


class LargestTensor(TorchDispatchMode):
    """Records the largest storage, in bytes, that any operator returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.num_bytes = max(self.num_bytes, x.untyped_storage().nbytes())
        return out


def largest_tensor(attention, num_tokens: int, dtype=torch.float32) -> int:
    """Bytes of the largest tensor that forward and backward make at the given number of tokens."""
    inputs = make_inputs(num_tokens, 2, 1, 16, seed=16, dtype=dtype)
    with LargestTensor() as largest:
        forward_backward(attention, inputs)
    return largest.num_bytes


class Dropped(torch.autograd.Function):
    """Its input has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


class Zeros(TorchDispatchMode):
    """Counts the tensors that are made to be zero, as autograd makes them in place of gradients that are none."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.zeros.default
        return func(*args, **(kwargs or {}))


def assert_fills_nothing_for_no_gradient(attention, inputs: list[Tensor], *, own: int = 0) -> None:
    """Outputs that have no gradient cost none of zeros in the backward pass, which makes `own` of its own; and where no output has one,
    the inputs have none."""
    q, k, v, d_out = inputs
    out = attention(q, k, v)
    with Zeros() as zeros:
        torch.autograd.grad(out, (q, k, v), d_out)
    assert zeros.count == own
    out = Dropped.apply(attention(q, k, v))
    with Zeros() as zeros:
        assert torch.autograd.grad(out, (q, k, v), d_out, allow_unused=True) == (None, None, None)
    assert zeros.count == 0
