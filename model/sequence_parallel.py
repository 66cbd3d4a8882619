"""Sequence parallelism (DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509): ranks that share rows, each with a stretch of their tokens.

All but attention goes token by token, on a rank's own stretch. Attention needs whole documents and treats heads apart: around it an
all-to-all gives each rank all tokens of its own heads, and afterwards all heads of its own tokens. cu_seqlens, blocks and windows are
therefore those of whole rows, and no attention knows of it.

Shape letters: P ranks of the group, N tokens of the packed rows, n = N / P of one rank, Hq and Hkv heads, D their width.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from configs.schema import ModelConfig


class SequenceParallel:
    """One rank's place in a group: what is its own of tokens and heads, and the exchange of one for the other.

    Gradients are right without a factor where each rank takes the sum of its own tokens' losses: the gradients that the ranks
    have of a parameter are then parts of a sum, over all ranks, as those of data-parallel ranks are.
    """

    def __init__(self, group: dist.ProcessGroup, config: ModelConfig) -> None:
        """`group` holds P ranks in the order of their stretches; P divides the query heads of `config`. Raises ValueError."""
        self.degree, self.rank = group.size(), group.rank()
        if config.num_heads % self.degree:
            raise ValueError(f"num_heads={config.num_heads}: must be a multiple of the {self.degree} ranks that share a row")
        self._group = group
        self._head_dim = config.head_dim
        self._copies = config.kv_copies(self.degree)

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's stretch `[n, ...]` of `[N, ...]`. Raises ValueError where P does not divide N."""
        if len(x) % self.degree:
            raise ValueError(f"{len(x)} tokens: must be a multiple of the {self.degree} ranks that share them")
        return x.chunk(self.degree)[self.rank]

    def all_tokens(self, x: Tensor) -> Tensor:
        """`[N, ...]` on every rank from the stretches `[n, ...]` of all; not differentiable."""
        whole = x.new_empty(self.degree * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.detach().contiguous(), group=self._group)
        return whole

    def own_channels(self, weight: Tensor) -> Tensor:
        """Of `[..., Hkv * D]`, a weight for each channel of k, those of the KV heads that `to_heads` gives this rank."""
        heads = weight.unflatten(-1, (-1, self._head_dim)).repeat_interleave(self._copies, dim=-2)
        return heads.chunk(self.degree, dim=-2)[self.rank].flatten(-2)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of own heads, q `[N, Hq/P, D]`, k and v `[N, Hkv * copies / P, D]`, from all heads of own tokens, q `[n, Hq, D]`,
        k and v `[n, Hkv, D]`."""
        k, v = (x.repeat_interleave(self._copies, dim=1) for x in (k, v))
        return self._to_heads(q), self._to_heads(k), self._to_heads(v)

    def _to_heads(self, x: Tensor) -> Tensor:
        by_rank = x.unflatten(1, (self.degree, -1)).transpose(0, 1)  # [P, n, H/P, D]
        return _all_to_all(by_rank.contiguous(), self._group.group_name).flatten(0, 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """All heads of own tokens, `[n, Hq, D]`, from all tokens of own heads, `[N, Hq/P, D]`."""
        by_rank = x.unflatten(0, (self.degree, -1))  # [P, n, Hq/P, D]
        return _all_to_all(by_rank.contiguous(), self._group.group_name).transpose(0, 1).flatten(1, 2)


# An operator, which torch.compile does not look into: inside a graph of torch 2.11 an all-to-all in an autograd.Function has a gradient
# of zeros.
@torch.library.custom_op("sequence_parallel::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, group: str) -> Tensor:
    """Part p of `[P, ...]` goes to rank p of the group of this name, in the place of the sender's number: its own transpose."""
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=_resolve_process_group(group))  # type: ignore[arg-type]  # torch 2.11 has no GroupName
    return received


@_all_to_all.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _keep_group(ctx, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _backward(ctx, d_received: Tensor):
    return _all_to_all(d_received.contiguous(), ctx.group), None


_all_to_all.register_autograd(_backward, setup_context=_keep_group)
