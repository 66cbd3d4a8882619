"""What every attention door checks before any work, and the document boundaries it reads on the way.

All errors are ValueErrors that name the argument, what was given (of what is neither number nor text, the type) and what is accepted.
"""

import itertools

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, softmax_scale: float | None) -> list[int]:
    """Check packed attention inputs: q `[T, Hq, D]`, k and v `[T, Hkv, D]`, cu_seqlens int32 `[n_docs+1]` or None.

    Returns the document boundaries `[0, ..., T]` as Python integers. Raises ValueError.
    """
    check_packed(q, k, v, cu_seqlens, softmax_scale)
    return document_bounds(cu_seqlens, num_tokens=q.shape[0])


def check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, softmax_scale: float | None) -> None:
    """The part of `check_attention` that reads no values: q `[T, Hq, D]`, k and v `[T, Hkv, D]`, cu_seqlens int32 `[n_docs+1]` or None."""
    check_tensors({"q": q, "k": k, "v": v})
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; both must be [T, Hkv, D]")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has T={q.shape[0]} tokens and k T={k.shape[0]}; they must be equal")
    check_heads(q, k)
    check_scale(softmax_scale)
    if cu_seqlens is not None:
        _check_boundaries(cu_seqlens, q.device)


def check_routing(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """The same for the routing alone, which reads no values."""
    return check_attention(q, k, k, cu_seqlens, None)


def check_decode(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> None:
    """Check one decoding step: q `[Hq, D]` of the newest token, k and v `[S, Hkv, D]` of all tokens so far."""
    if not _is_dense(q, 2):
        raise ValueError(f"q must be a tensor [Hq, D] holding one token, got {_describe(q)}")
    check_attention(q[None], k[-1:] if _is_dense(k, 3) else k, v[-1:] if _is_dense(v, 3) else v, None, softmax_scale)
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; both must be [S, Hkv, D]")


def check_tensors(named: dict[str, Tensor]) -> None:
    """Each a dense, non-empty 3-d floating tensor, all of one dtype on one device, which has values."""
    for name, x in named.items():
        if not _is_dense(x, 3):
            raise ValueError(f"{name} must be a tensor [tokens, heads, head_dim], got {_describe(x)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; accepted: {', '.join(map(str, DTYPES))}")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; every dimension must be at least 1")
    first_name, first = next(iter(named.items()))
    for name, x in named.items():
        if x.dtype != first.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} but {first_name} has {first.dtype}; they must be equal")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device} but {first_name} is on {first.device}; they must be on one device")
    if first.device.type == "meta":
        raise ValueError(f"{first_name} is on meta; accepted: a device that holds values")


def check_heads(q: Tensor, k: Tensor) -> None:
    """Same head dimension; the key/value heads divide the query heads (grouped-query attention)."""
    (num_q, dim_q), (num_kv, dim_kv) = q.shape[-2:], k.shape[-2:]
    if dim_q != dim_kv:
        raise ValueError(f"q has head dimension {dim_q} and k {dim_kv}; they must be equal")
    if num_q % num_kv:
        raise ValueError(f"q has {num_q} heads, which k's {num_kv} heads do not divide; Hq must be a multiple of Hkv")


def check_scale(softmax_scale: float | None) -> None:
    """None, or a number that is positive and finite."""
    if softmax_scale is None:
        return
    is_number = isinstance(softmax_scale, int | float) and not isinstance(softmax_scale, bool)
    if not is_number or not 0 < softmax_scale < float("inf"):
        raise ValueError(f"{_given('softmax_scale', softmax_scale)}; accepted: None (head_dim ** -0.5) or a positive finite number")


def check_positive_int(**named: int) -> None:
    """Each a plain integer of at least 1 (block_size, topk)."""
    for name, value in named.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{_given(name, value)}; accepted: an integer of at least 1")


def check_backend(backend: str, known: tuple[str, ...]) -> None:
    """One of the names in `known`."""
    if not isinstance(backend, str) or backend not in known:
        raise ValueError(f"{_given('backend', backend)}; accepted: {', '.join(known)}")


def _check_boundaries(cu_seqlens: Tensor, device: torch.device) -> None:
    """A dense int32 vector of at least two, on the inputs' device or the CPU."""
    if not _is_dense(cu_seqlens, 1) or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be a tensor [n_docs+1] with n_docs >= 1, got {_describe(cu_seqlens)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}; accepted: torch.int32")
    if cu_seqlens.device not in (device, torch.device("cpu")):
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; accepted: {device} (as q) or cpu")


def document_bounds(cu_seqlens: Tensor | None, *, num_tokens: int) -> list[int]:
    """`cu_seqlens`, whose shape, dtype and device `check_packed` has checked, as a checked list of integers; None means one document.

    It may live on the CPU beside GPU inputs, which saves a device synchronisation.
    """
    if cu_seqlens is None:
        return [0, num_tokens]
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens starts at {bounds[0]}; it must start at 0")
    for left, right in itertools.pairwise(bounds):
        if right <= left:
            raise ValueError(f"cu_seqlens goes from {left} to {right}; it must strictly increase (no empty documents)")
    if bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}; it must end at the number of tokens, {num_tokens}")
    return bounds


def _is_dense(x: object, num_dims: int) -> bool:
    return isinstance(x, Tensor) and not x.is_nested and x.layout is torch.strided and x.dim() == num_dims


def _given(name: str, value: object) -> str:
    return f"{name}={value!r}" if isinstance(value, int | float | str) else f"{name} is {_describe(value)}"


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    if x.is_nested or x.layout is not torch.strided:
        return "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
    return f"a tensor of shape {tuple(x.shape)}"
