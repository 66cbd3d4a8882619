"""Cached generation of one sequence: sparse in MoBA layers, equal to the uncached forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from model.cache import LayerCache, Mark
from model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue `prompt` with the model's present attention and RoPE.

    Args:
        prompt: int64 `[n]`, n >= 1, on any device.
        max_new_tokens: tokens to add at most, at least 1.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled.
        top_p: sample among the likeliest tokens that together reach this probability, in (0, 1].
        eos_id: stop after this token.
        stop: called with the new tokens so far; stop where it says so.
        seed: of the sampling, which is drawn on the CPU and so does not depend on the device.

    Returns: the new tokens alone, int64 `[m]` on the CPU, 1 <= m <= max_new_tokens, `eos_id` included where it came.
    Raises: ValueError for an empty prompt, a token outside the vocabulary, a sum beyond `RopeConfig.max_context`, a bad option.
    """
    _check(model, prompt, max_new_tokens, temperature, top_p)
    cursor = Cursor(model, capacity=len(prompt) + max_new_tokens)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "eos_id": eos_id, "stop": stop, "seed": seed}
    return write_on(cursor, cursor.advance(prompt), max_new_tokens=max_new_tokens, **options)


@torch.inference_mode()
def write_on(
    cursor: "Cursor",
    logits: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    seed: int = 0,
) -> Tensor:
    """As `generate`, behind what `cursor` has read, whose room must do; `logits` `[V]` are those of the next token."""
    generator = Generator().manual_seed(seed)
    new_tokens: list[int] = []
    while True:
        new_tokens.append(choose_token(logits, temperature, top_p, generator))
        if len(new_tokens) == max_new_tokens or new_tokens[-1] == eos_id or (stop and stop(new_tokens)):
            return torch.tensor(new_tokens)
        logits = cursor.advance(torch.tensor(new_tokens[-1:]))


class Cursor:
    """A sequence that a model has read so far: its length and each layer's cache."""

    def __init__(self, model: Transformer, capacity: int) -> None:
        """Room for `capacity` tokens."""
        self.model = model
        self.length = 0
        empty = model.embedding.weight.new_empty(0, model.config.num_kv_heads, model.config.head_dim)
        self.caches = [LayerCache(attention, capacity, empty) for attention in model.attention]

    def advance(self, tokens: Tensor) -> Tensor:
        """Read tokens int64 `[n]` (any number first, then one at a time); logits `[V]` of what comes after the last."""
        tokens = tokens.to(self.model.embedding.weight.device)
        positions = torch.arange(self.length, self.length + len(tokens), device=tokens.device)
        bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
        self.length += len(tokens)
        return self.model.head(self.model.hidden(tokens, positions, bounds, self.caches)[-1])

    def mark(self) -> list[Mark]:
        """The present place, to come back to."""
        return [cache.mark() for cache in self.caches]

    def rewind(self, marks: list[Mark]) -> None:
        """Forget what has been read since `mark`."""
        self.length = marks[0].length
        for cache, mark in zip(self.caches, marks, strict=True):
            cache.rewind(mark)


def choose_token(logits: Tensor, temperature: float, top_p: float, generator: Generator) -> int:
    """One token from logits `[V]`: greedy at temperature 0, else nucleus sampling (Holtzman et al., arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    probs, order = (logits.double().cpu() / temperature).softmax(dim=-1).sort(descending=True, stable=True)
    mass_before = probs.cumsum(dim=-1) - probs
    kept = probs.masked_fill(mass_before >= top_p, 0.0)
    kept[0] = probs[0]  # rounding must never leave nothing to choose from
    return int(order[torch.multinomial(kept, 1, generator=generator)])


def _check(model: Transformer, prompt: Tensor, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if prompt.dim() != 1 or prompt.dtype != torch.int64:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)} and dtype {prompt.dtype}; accepted: int64 [n]")
    if len(prompt) == 0:
        raise ValueError("prompt is empty; accepted: at least 1 token")
    vocab_size = model.config.vocab_size
    lowest, highest = int(prompt.min()), int(prompt.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"prompt holds tokens {lowest}..{highest}; the model's vocabulary is 0..{vocab_size - 1}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; accepted: at least 1")
    longest = model.rope.max_context(model.config.max_seq_len, model.attention)
    if longest is not None and len(prompt) + max_new_tokens > longest:
        total = f"{len(prompt)} + {max_new_tokens} = {len(prompt) + max_new_tokens}"
        raise ValueError(f"prompt and new tokens are {total} tokens; the model's RoPE is good for {longest}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; accepted: 0 (greedy) or a positive finite number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; accepted: above 0, at most 1")
