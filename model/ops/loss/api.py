"""The public door of the loss: validation, then the chosen backend."""

import importlib.util
import os

import torch
from torch import Tensor

from model.ops.checks import DTYPES, check_backend
from model.ops.loss.reference import reference_loss
from model.ops.loss.rows import torch_rows
from model.ops.loss.tiled import tiled_loss

BACKENDS = ("auto", "reference", "torch", "triton", "liger")
IGNORE = -100
"""The label of a token that predicts nothing."""


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, *, backend: str = "auto") -> Tensor:
    """-log softmax(W x_t)[label_t] of each token, without all logits, differentiable in x and weight.

    Args:
        x: what the head reads `[N, h]`; float16, bfloat16, float32 or float64.
        weight: the head `[V, h]`, of the same dtype.
        labels: int64 `[N]`, below V, or `IGNORE`.
        backend: one of `BACKENDS`. "reference" is the specification and has all logits at once. "torch" goes in tiles of
            `tiled.LOGITS_BYTES`, on any device; "triton" too, with softmax and gradient in one kernel on a CUDA device; "liger" is
            the package's, on a CUDA device. "auto" takes "triton" on a CUDA device where it serves the call, else "torch".

    Returns: nats, `[N]`, fp32 (fp64 for fp64 inputs), 0 where the label is `IGNORE`.
    Raises: ValueError naming the argument, its value and what is accepted.
    """
    check_backend(backend, BACKENDS)
    _check(x, weight, labels)
    if backend == "auto":
        backend = "triton" if x.is_cuda and not refusal("triton", x.device, x.dtype) else "torch"
    if refused := refusal(backend, x.device, x.dtype):
        raise ValueError(f"backend={backend!r}: {refused}; backend='torch' takes others")
    if backend == "reference":
        return reference_loss(x, weight, labels, ignore=IGNORE)
    if backend == "liger":
        from model.ops.loss.liger import liger_loss  # asks for a GPU as it is imported

        return liger_loss(x, weight, labels, ignore=IGNORE)
    rows = torch_rows
    if backend == "triton":
        from model.ops.loss.kernel import triton_rows  # Triton may be missing where its kernels are not used

        rows = triton_rows
    return tiled_loss(x, weight, labels, ignore=IGNORE, rows=rows)


def refusal(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve tensors of this kind, and what is accepted; None if it can."""
    if backend not in ("triton", "liger"):
        return None
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the device is {device.type}; accepted: cuda"
    if dtype == torch.float64:
        return f"the dtype is {dtype}; accepted: torch.float16, torch.bfloat16, torch.float32"
    if importlib.util.find_spec(package := {"liger": "liger_kernel"}.get(backend, backend)) is None:
        return f"the package {package} is not installed"
    return None


def _check(x: Tensor, weight: Tensor, labels: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be [N, h] and [V, h]")
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"x has dtype {x.dtype} and weight {weight.dtype}; both must be one of {', '.join(map(str, DTYPES))}")
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; they must be int64 [N] with N={len(x)}")
