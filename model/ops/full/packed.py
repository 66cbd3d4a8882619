"""What `auto` takes on a GPU: long documents one by one through cuDNN, the runs of shorter ones between them through FlashAttention."""

import itertools
from functools import partial

import torch
from torch import Tensor

from model.ops.full.flash import full_flash
from model.ops.full.gpu import compute_capability, refusal
from model.ops.full.sdpa import Attend, full_cudnn, one_by_one

# A document of so many tokens is worth a call of its own: cuDNN is the quicker kernel on Hopper, but each call costs tens of microseconds.
# Measured on one H200, see README.md.
CUDNN_LENGTH = 4096


def full_packed(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], softmax_scale: float) -> Tensor:
    """q `[T, Hq, D]`, k and v `[T, Hkv, D]`, which `flash` takes, `bounds` the document boundaries; returns `[T, Hq, D]`.

    All documents go through FlashAttention where cuDNN does not serve, or on GPUs before Hopper.
    """
    # PyTorch 2.11 compiles `<` of tuples and fails at `>=`.
    with_cudnn = not compute_capability(q.device) < (9, 0) and refusal("cudnn", q) is None
    parts: list[tuple[Attend, int]] = []
    for run in runs(bounds, CUDNN_LENGTH) if with_cudnn else [bounds]:
        inside = [bound - run[0] for bound in run]
        if with_cudnn and inside[1] >= CUDNN_LENGTH:
            attend: Attend = partial(full_cudnn, bounds=inside, softmax_scale=softmax_scale)
        else:
            attend = partial(full_flash, cu_seqlens=torch.tensor(inside, dtype=torch.int32), softmax_scale=softmax_scale)
        parts.append((attend, inside[-1]))
    return one_by_one(parts, q, k, v)


def runs(bounds: list[int], long: int) -> list[list[int]]:
    """The boundaries of each document of `long` tokens or more, and of each run of shorter documents between those."""
    found: list[list[int]] = []
    after_short = False
    for start, end in itertools.pairwise(bounds):
        is_long = end - start >= long
        if after_short and not is_long:
            found[-1].append(end)
        else:
            found.append([start, end])
        after_short = not is_long
    return found
