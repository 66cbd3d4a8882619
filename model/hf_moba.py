"""MoBA in transformers: Llama, Mistral, Qwen2 and Qwen3 whose layers attend as `attention_layers` in their config says.

Each layer is `full`, `sliding(WINDOW)`, where a query sees the last WINDOW tokens, itself included, or `moba(BLOCK_SIZE, TOPK)`, where it
sees its own block of keys causally and, of the blocks wholly before it, the TOPK-1 with the highest <q, mean key> (arXiv 2502.13189,
eq. 2-6; ties go to the earlier block). Made for exported weights, beside which this file lies; it needs torch and transformers alone:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Layers in `nope_layers` have no positions, the others' are divided by `position_interpolation`. Exact, cached generation included, but not
fast: keys that are not seen are masked, so time grows with the square of the length.
"""

import re
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import causal_mask_function

NAME = "moba"
_KIND = re.compile(r"full|sliding\(([1-9]\d*)\)|moba\(([1-9]\d*), ([1-9]\d*)\)")
_MASK_BUDGET = 1 << 28  # elements of a mask that are held at once


def moba_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, device=None, **kwargs
) -> Tensor:
    """Which tokens so far are text and not padding: bool `[batch, q_offset + q_length]`, all that `moba_attention` must be told."""
    if mask_function is not causal_mask_function or kv_offset != 0:
        raise ValueError("a MoBA model takes one document a row: no packed rows (restarting position_ids), no other mask function")
    length = int(q_offset) + q_length  # a static cache is longer
    if attention_mask is None:
        return torch.ones(batch_size, length, dtype=torch.bool, device=device)
    if attention_mask.shape[-1] < length:
        raise ValueError(f"attention_mask covers {attention_mask.shape[-1]} tokens of {length}: give it for all tokens so far")
    return attention_mask[:, :length].bool()


def moba_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs) -> tuple[Tensor, None]:
    """`[batch, L, Hq, D]` of the newest L tokens, from query `[batch, Hq, L, D]`, key and value `[batch, Hkv, S, D]`.

    `attention_mask` is that of `moba_mask`. Padding may stand before and after a row's text, not inside it; blocks are counted from the
    text's first token, and at padding the output is 0.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        raise ValueError("a MoBA model takes attention_mask as [batch, tokens] or not at all")
    if dropout:
        raise ValueError(f"attention_dropout={dropout}: a MoBA model has none")
    kind = module.config.attention_layers[module.layer_idx]
    before = attention_mask.shape[1] - query.shape[2]  # tokens of earlier calls
    output = torch.zeros_like(query)
    for row, (first, last) in enumerate(_text_bounds(attention_mask)):
        new = max(first, before)  # first new token that is text
        if new < last:
            q, k, v = query[row, :, new - before : last - before], key[row, :, first:last], value[row, :, first:last]
            output[row, :, new - before : last - before] = _attend(q, k, v, kind, scaling)
    return output.transpose(1, 2), None


def _text_bounds(mask: Tensor) -> list[tuple[int, int]]:
    """First token and end of the text in each row of bool `[batch, S]`; equal for a row of padding alone."""
    first, length = mask.int().argmax(dim=1), mask.sum(dim=1)
    position = torch.arange(mask.shape[1], device=mask.device)
    in_one_piece = (position >= first[:, None]) & (position < (first + length)[:, None])
    if not torch.equal(mask, in_one_piece):
        raise ValueError("attention_mask has padding inside the text of a row; a MoBA model takes it before and after alone")
    return [(start, start + count) for start, count in zip(first.tolist(), length.tolist(), strict=True)]


def _attend(q: Tensor, k: Tensor, v: Tensor, kind: str, scaling: float | None) -> Tensor:
    """`[Hq, n, D]` of the last n tokens of a document, from q `[Hq, n, D]`, k and v `[Hkv, m, D]` of all its m tokens."""
    num_tokens, start = k.shape[1], k.shape[1] - q.shape[1]
    match = _KIND.fullmatch(kind)
    assert match  # as `_checked` made sure
    window, block_size, topk = (int(number or 0) for number in match.groups())
    block_size, topk = block_size or num_tokens, topk or 1  # other kinds: all tokens are one block
    means = _block_means(k, block_size)
    outputs = []
    begin = start
    while begin < num_tokens:
        own = begin // block_size
        end = min((own + 1) * block_size, num_tokens, begin + max(1, _MASK_BUDGET // (len(q) * num_tokens)))
        queries = q[:, begin - start : end - start]
        seen = _seen(queries, means[:, :own], begin, end, block_size, topk)
        if window:
            seen = seen & ~seen.tril(begin - window)
        keys, values, grouped = k[None, :, :end], v[None, :, :end], len(q) != len(k)
        outputs.append(
            scaled_dot_product_attention(queries[None], keys, values, attn_mask=seen[None], scale=scaling, enable_gqa=grouped)[0]
        )
        begin = end
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def _block_means(k: Tensor, block_size: int) -> Tensor:
    """Mean key of each block before the last token's own, fp32 at least `[Hkv, N, D]`, from k `[Hkv, m, D]`."""
    num_past = (k.shape[1] - 1) // block_size
    blocks = k[:, : num_past * block_size].unflatten(1, (num_past, block_size))
    return blocks.to(torch.promote_types(k.dtype, torch.float32)).mean(dim=2)


@torch.no_grad()
def _seen(q: Tensor, means: Tensor, begin: int, end: int, block_size: int, topk: int) -> Tensor:
    """What tokens [begin, end), all of one block, see of tokens [0, end): bool `[Hq or 1, n, end]`.

    q `[Hq, n, D]`; means `[Hkv, own, D]` of the blocks before theirs.
    """
    own = means.shape[1]
    position = torch.arange(end, device=q.device)
    causal = position <= torch.arange(begin, end, device=q.device)[:, None]  # [n, end]
    if topk > own:  # every past block is chosen
        return causal[None]
    with torch.autocast(q.device.type, enabled=False):  # in less than fp32 other blocks would win
        by_kv_head = q.to(means.dtype).unflatten(0, (len(means), -1))  # [Hkv, G, n, D]
        gate = torch.einsum("hgnd,hbd->hgnb", by_kv_head, means).flatten(0, 1)  # [Hq, n, own]
    # A stable sort keeps tied blocks in order: ties go to the earlier block.
    best = gate.sort(dim=-1, descending=True, stable=True).indices[..., : topk - 1]
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, best, True).repeat_interleave(block_size, dim=-1)
    in_own = torch.ones(*chosen.shape[:2], end - own * block_size, dtype=torch.bool, device=q.device)
    return torch.cat([chosen, in_own], dim=-1) & causal


AttentionInterface.register(NAME, moba_attention)
AttentionMaskInterface.register(NAME, moba_mask)


def _checked(config):
    """The config with our attention function in it. Raises ValueError for layers that cannot be read and for another function."""
    layers = getattr(config, "attention_layers", None)
    if not isinstance(layers, (list, tuple)) or len(layers) != config.num_hidden_layers:
        raise ValueError(f"attention_layers={layers!r}: must name the attention of {config.num_hidden_layers} layers")
    for layer in layers:
        if not _KIND.fullmatch(layer):
            raise ValueError(f"attention_layers: {layer!r}: accepted: full, sliding(WINDOW), moba(BLOCK_SIZE, TOPK)")
    _check_function(config._attn_implementation)
    config._attn_implementation = NAME
    return config


def _check_function(name: str | dict | None) -> None:
    if name not in (None, NAME):
        raise ValueError(f"attn_implementation={name!r}: would make every layer full; a MoBA model has its own, {NAME!r}")


def _without_positions(module, arguments, settings):
    """Gives a layer's attention the rotation by nothing."""
    cos, sin = settings["position_embeddings"]
    return arguments, settings | {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def _interpolate(module, arguments, *, factor: float) -> None:
    """Divides the frequencies of the rotation, always anew: loading sets them after the model is made."""
    module.inv_freq = module.original_inv_freq / factor


class _Moba:
    """Takes transformers' class as it is; only the attention function is ours."""

    def __init__(self, config, *arguments, **settings) -> None:
        super().__init__(_checked(config), *arguments, **settings)  # type: ignore[call-arg]
        if getattr(config, "position_interpolation", 1) != 1:
            interpolate = partial(_interpolate, factor=config.position_interpolation)
            self.model.rotary_emb.register_forward_pre_hook(interpolate)  # type: ignore[attr-defined]
        for index in getattr(config, "nope_layers", ()):
            attention = self.model.layers[index].self_attn  # type: ignore[attr-defined]
            attention.register_forward_pre_hook(_without_positions, with_kwargs=True)

    def set_attn_implementation(self, attn_implementation, *arguments, **settings) -> None:
        _check_function(attn_implementation)


class MobaLlamaConfig(LlamaConfig):
    model_type = "moba_llama"


class MobaMistralConfig(MistralConfig):
    model_type = "moba_mistral"


class MobaQwen2Config(Qwen2Config):
    model_type = "moba_qwen2"


class MobaQwen3Config(Qwen3Config):
    model_type = "moba_qwen3"


class MobaLlamaForCausalLM(_Moba, LlamaForCausalLM):
    config_class = MobaLlamaConfig


class MobaMistralForCausalLM(_Moba, MistralForCausalLM):
    config_class = MobaMistralConfig


class MobaQwen2ForCausalLM(_Moba, Qwen2ForCausalLM):
    config_class = MobaQwen2Config


class MobaQwen3ForCausalLM(_Moba, Qwen3ForCausalLM):
    config_class = MobaQwen3Config


# So that a model that was loaded and trained on can be saved again with this file beside it.
for _config in (MobaLlamaConfig, MobaMistralConfig, MobaQwen2Config, MobaQwen3Config):
    _config.register_for_auto_class()
for _model in (MobaLlamaForCausalLM, MobaMistralForCausalLM, MobaQwen2ForCausalLM, MobaQwen3ForCausalLM):
    _model.register_for_auto_class("AutoModelForCausalLM")
