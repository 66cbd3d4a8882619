"""What a layer keeps of its forward pass for the backward pass: all, or what the rest is computed again from (arXiv 1604.06174)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.host_memory import HostMemory
from model.ops.swiglu import output_unread

# The forward passes of attention, by the names that torch's dispatcher knows them by: what `selective` never computes twice. Each gives
# its output and what its backward pass reads besides q, k and v: log-sum-exp, chosen blocks.
ATTENTION = frozenset(
    {
        "moba::forward",
        "moba::blocked_forward",
        "sliding::chunked_forward",
        "torch_attn::_varlen_attn",
        "full::flash_forward",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
    }
)


def run_layer(layer: Callable[..., Tensor], kept: str, host: HostMemory, x: Tensor, *args: Any) -> Tensor:
    """`layer(x, *args)`, which keeps for its backward pass what `kept` (`configs.layers.ACTIVATIONS`) leaves of it.

    What is computed again has the same bits: the same kernels run on the same input, and nothing in a layer is drawn by chance. So
    MoBA, where it is computed again, chooses the same blocks.
    """
    host.settle()
    if kept == "none" or not torch.is_grad_enabled():
        return layer(x, *args)
    contexts = _keep_attention if kept == "selective" else _keep_nothing
    with host.keeping(x) if kept == "offload" else contextlib.nullcontext():
        return checkpoint(layer, x, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _keep_nothing() -> tuple[Any, Any]:
    """Contexts of the forward pass, and of when it is done again."""
    return contextlib.nullcontext(), output_unread()


def _keep_attention() -> tuple[Any, Any]:
    first, again = create_selective_checkpoint_contexts(_policy)
    return first, _both(again)


@contextlib.contextmanager
def _both(again: Any) -> Iterator[None]:
    with again, output_unread():
        yield


def _policy(context: object, operator: torch._ops.OpOverload, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
