"""What is measured: a call of some length under some attention, its inputs drawn by seed, and the kernels that serve it.

Shape letters: T tokens, Hq query heads, Hkv key/value heads, D head dimension, B block size.
"""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs.layers import LayerAttention
from configs.schema import AttentionKernel, BenchmarkConfig, KernelDocuments, KernelInputs, KernelPrecision
from model.accounting import FULL, attention_pairs
from model.ops.full import full_attention
from model.ops.moba import moba_attention
from scripts.attention_benchmark.trained import Trained

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# Dense rows and the backends of full attention that serve them.
DENSE = {AttentionKernel.CUDNN: "cudnn", AttentionKernel.FLASH: "flash", AttentionKernel.FULL: "auto"}
# Ends of all documents but the last: sixteenths of the tokens, and a few tokens more, so that none is a whole number of blocks.
_MIXED = ((1, 1), (5, 8), (13, 27), (15, 64))
# The choice is checked on at least so many tokens.
_CHECKED_TOKENS = 4096
# Skewed inputs: the sink's part of queries and keys, and the part of position, whose product falls with the distance.
_SINK_QUERY, _SINK_KEY = 5.0, 2.0
_PLACE, _PLACE_WAVES = 1.0, 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: so many tokens, of some kind and in some documents, under one attention."""

    config: BenchmarkConfig
    num_tokens: int
    attention: LayerAttention
    inputs: KernelInputs = KernelInputs.RANDOM
    documents: KernelDocuments = KernelDocuments.ONE
    document_tokens: int = 0
    """Tokens in each of `equal` documents."""
    trained: Trained | None = None
    """Where `trained` inputs come from."""

    @property
    def documents_label(self) -> str:
        """`one`, `mixed`, `512 each`."""
        return f"{self.document_tokens:,} each" if self.documents is KernelDocuments.EQUAL else self.documents.value

    @property
    def bounds(self) -> list[int]:
        """Document boundaries `[0, ..., T]`."""
        if self.documents is KernelDocuments.ONE:
            return [0, self.num_tokens]
        if self.documents is KernelDocuments.EQUAL:
            return [*range(0, self.num_tokens, self.document_tokens), self.num_tokens]
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
        if self.documents is KernelDocuments.MIXED:
            least *= 2  # for the longest document to have that many
        few = _CHECKED_TOKENS if self.is_full else max(_CHECKED_TOKENS, least)
        return replace(self, num_tokens=min(self.num_tokens, few - 1))  # the last block is short


def label(case: Case) -> str:
    """The attention, and what else than one document of random inputs it is measured on: `moba(128, 8), mixed, trained`."""
    documents = [] if case.documents is KernelDocuments.ONE else [case.documents_label]
    return ", ".join([str(case.attention), *documents, *([] if case.inputs is KernelInputs.RANDOM else [case.inputs.value])])


def all_cases(config: BenchmarkConfig, trained: Trained | None = None) -> list[tuple[AttentionKernel, Case]]:
    """What the config asks for, in the order of measuring: dense rows first, whose rate on one document the others are held against."""
    one = {"documents": KernelDocuments.ONE}
    cuts: list[dict[str, Any]] = [{"documents": kind} for kind in config.documents if kind is not KernelDocuments.EQUAL]
    if KernelDocuments.EQUAL in config.documents:
        cuts += [{"documents": KernelDocuments.EQUAL, "document_tokens": tokens} for tokens in config.document_tokens]
    lengths, found = sorted(config.lengths), []
    for length, cut in itertools.product(lengths, cuts if one in cuts else [one, *cuts]):
        case = Case(config=config, num_tokens=length, attention=FULL, **cut)
        found += [(row, case) for row in config.rows if row in DENSE and length <= config.dense_up_to]
    for length, cut, inputs, (block_size, topk) in itertools.product(lengths, cuts, config.inputs, config.settings):
        moba = LayerAttention(kind="moba", block_size=block_size, topk=topk)
        case = Case(config=config, num_tokens=length, attention=moba, inputs=inputs, trained=trained, **cut)
        found += [(row, case) for row in config.rows if row not in DENSE]
    return found


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
    if case.inputs is KernelInputs.SKEWED:
        _skew(q, k, case)
    if case.inputs is KernelInputs.TRAINED:
        assert case.trained
        q, k, v = (x.to(device, dtype) for x in case.trained.draw(case.bounds))
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
    bounds = torch.tensor(case.bounds, dtype=torch.int32)
    if row in DENSE:
        return partial(full_attention, cu_seqlens=bounds, backend=DENSE[row])
    block_size, topk = case.attention.block_size, case.attention.topk
    if row is AttentionKernel.FLASH_MOBA:
        return _flash_moba(bounds.to(device), max(case.lengths), block_size, topk)
    return partial(moba_attention, block_size=block_size, topk=topk, cu_seqlens=bounds, backend=row.value)


def _flash_moba(bounds: Tensor, longest: int, block_size: int, topk: int) -> Attention:
    from flash_moba import flash_moba_varlen_func  # optional: built from source, for CUDA

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_moba_varlen_func(q, k, v, bounds, bounds, longest, longest, block_size, topk, causal=True)

    return attend
