"""What is measured: a call of some length under some attention, its inputs drawn by seed, and the kernels that serve it.

Shape letters: T tokens, Hq query heads, Hkv key/value heads, D head dimension, B block size.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.layers import LayerAttention
from configs.schema import AttentionKernel, BenchmarkConfig, KernelDocuments, KernelInputs, KernelPrecision
from model.accounting import FULL, attention_pairs
from model.ops.full.sdpa import sdpa_heads
from model.ops.moba import moba_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

DENSE = {AttentionKernel.CUDNN: SDPBackend.CUDNN_ATTENTION, AttentionKernel.FA2: SDPBackend.FLASH_ATTENTION}
# Ends of all documents but the last: sixteenths of the tokens, and a few tokens more, so that none is a whole number of blocks.
_MIXED = ((1, 1), (5, 8), (13, 27), (15, 64))
# The choice is checked on at least so many tokens.
_CHECKED_TOKENS = 4096
# Skewed inputs: the sink's part of queries and keys, and the part of position, whose product falls with the distance.
_SINK_QUERY, _SINK_KEY = 5.0, 2.0
_PLACE, _PLACE_WAVES = 1.0, 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: so many tokens under one attention."""

    config: BenchmarkConfig
    num_tokens: int
    attention: LayerAttention

    @property
    def bounds(self) -> list[int]:
        """Document boundaries `[0, ..., T]`; dense attention sees one document."""
        if self.attention == FULL or self.config.documents is KernelDocuments.ONE:
            return [0, self.num_tokens]
        ends = (self.num_tokens * share // 16 + more for share, more in _MIXED)
        return sorted({0, self.num_tokens, *(min(end, self.num_tokens) for end in ends)})

    @property
    def lengths(self) -> list[int]:
        """Tokens in each document."""
        return [end - start for start, end in itertools.pairwise(self.bounds)]

    @property
    def is_full(self) -> bool:
        """Every query sees all that is before it in its document: MoBA too is full attention then."""
        return self.attention == FULL or self.attention.topk * self.attention.block_size >= max(self.lengths)

    @property
    def seen(self) -> int:
        """(query, key) pairs of one head: the tokens really seen, of the own block those up to the query."""
        return attention_pairs(self.attention, self.lengths)

    def reduced(self) -> "Case":
        """The same on the fewest tokens that are worth a check in O(T²): queries choose where those of the whole case do."""
        least = (self.attention.topk + 2) * self.attention.block_size
        if self.config.documents is KernelDocuments.MIXED:
            least *= 2  # for the longest document to have that many
        few = _CHECKED_TOKENS if self.is_full else max(_CHECKED_TOKENS, least)
        return replace(self, num_tokens=min(self.num_tokens, few - 1))  # the last block is short


def all_cases(config: BenchmarkConfig) -> list[tuple[AttentionKernel, Case]]:
    """What the config asks for, in the order of measuring: dense rows first, whose rate the others are held against."""
    attentions = [LayerAttention(kind="moba", block_size=block_size, topk=topk) for block_size, topk in config.settings]
    lengths = sorted(config.lengths)
    dense = [(row, length, FULL) for length in lengths if length <= config.dense_up_to for row in config.rows if row in DENSE]
    sparse = [(row, length, moba) for length in lengths for moba in attentions for row in config.rows if row not in DENSE]
    return [(row, Case(config=config, num_tokens=length, attention=attention)) for row, length, attention in dense + sparse]


def draw_inputs(case: Case, device: torch.device) -> list[Tensor]:
    """q `[T, Hq, D]`, k and v `[T, Hkv, D]`, which require gradients, and the gradient `[T, Hq, D]` of the output."""
    config = case.config
    dtype = torch.bfloat16 if config.dtype is KernelPrecision.BF16 else torch.float16
    # One of our own: a CUDA graph whose capture fails leaves the default one unusable.
    generator = torch.Generator(device).manual_seed(config.seed)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    q, k, v, d_out = (
        torch.randn(case.num_tokens, count, config.head_dim, generator=generator, device=device, dtype=dtype) for count in heads
    )
    if config.inputs is KernelInputs.SKEWED and case.attention != FULL:
        _skew(q, k, case)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out]


def _skew(q: Tensor, k: Tensor, case: Case) -> None:
    """Adds to q and k: along the first dimension what draws queries to their document's first block, along others their place."""
    q[..., 0] += _SINK_QUERY
    for start, end in itertools.pairwise(case.bounds):
        k[start : min(start + case.attention.block_size, end), :, 0] += _SINK_KEY
        position = torch.arange(end - start, device=q.device, dtype=torch.float64)
        waves = min(_PLACE_WAVES, (q.shape[-1] - 1) // 2)
        # Radians [L, waves]; at no distance do all waves come round together.
        angle = position[:, None] / 64 / 3.3 ** torch.arange(waves, device=q.device)
        place = _PLACE * torch.cat([angle.cos(), angle.sin()], dim=1)[:, None].to(q.dtype)
        for x in (q, k):
            x[start:end, :, 1 : 1 + 2 * waves] += place


def is_installed(row: AttentionKernel) -> bool:
    """Whether the package of a row that needs one can be found."""
    return row is not AttentionKernel.FLASH_MOBA or importlib.util.find_spec("flash_moba") is not None


def kernel_of(row: AttentionKernel, case: Case, device: torch.device) -> Attention:
    """The row's attention on this case, a function of q, k and v. Raises ImportError where its package cannot be imported."""
    if row in DENSE:
        return partial(_sdpa, backend=DENSE[row])
    bounds = torch.tensor(case.bounds, dtype=torch.int32)
    block_size, topk = case.attention.block_size, case.attention.topk
    if row is AttentionKernel.FLASH_MOBA:
        return _flash_moba(bounds.to(device), max(case.lengths), block_size, topk)
    return partial(moba_attention, block_size=block_size, topk=topk, cu_seqlens=bounds, backend=row.value)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa_heads(q, k, v, is_causal=True, softmax_scale=1 / math.sqrt(q.shape[-1]))


def _flash_moba(bounds: Tensor, longest: int, block_size: int, topk: int) -> Attention:
    from flash_moba import flash_moba_varlen_func  # optional: built from source, for CUDA

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_moba_varlen_func(q, k, v, bounds, bounds, longest, longest, block_size, topk, causal=True)

    return attend
