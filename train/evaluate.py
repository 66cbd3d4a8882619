"""Loss on held-out text: a few fixed rows inside the loop, and whole long documents for `scripts.evaluate`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data.loader import IGNORE, Batch
from model.transformer import Transformer
from train.distributed import Ranks, sum_over_ranks
from train.engine import Engine

# Tokens in one forward pass of a document evaluation, where the context is shorter.
_PASS_TOKENS = 8192


def heldout_loss(engine: Engine, batches: Sequence[Batch], ranks: Ranks) -> float:
    """Mean loss in nats over the held-out rows' targets, over all ranks; every rank holds equally many `batches`."""
    total = sum(float(engine.losses(batch.to(ranks.device)).double().sum()) for batch in batches)
    return sum_over_ranks([total], ranks.device)[0] / batches[0].step_targets


@dataclass(kw_only=True)
class Bucket:
    """Tokens in [low, high) of some measure, and what they cost."""

    low: int
    high: int
    tokens: int = 0
    nats: float = 0.0

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@dataclass(kw_only=True)
class Scores:
    """Losses of held-out documents under one attention setting and one context length."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    by_position: dict[int, Bucket] = field(default_factory=dict)
    by_length: dict[int, Bucket] = field(default_factory=dict)

    def add(self, losses: np.ndarray, text_bytes: int) -> None:
        """One document: fp64 losses [tokens - 1] of its tokens 1, 2, ..., and the UTF-8 bytes of the text they spell."""
        self.nats += float(losses.sum())
        self.tokens += len(losses)
        self.text_bytes += text_bytes
        self._count(self.by_length, len(losses) + 1, losses)
        position = np.arange(1, len(losses) + 1)
        for power in range(int(position[-1]).bit_length()):
            low, high = 1 << power, 2 << power
            self._count(self.by_position, low, losses[low - 1 : high - 1])

    @staticmethod
    def _count(buckets: dict[int, Bucket], value: int, losses: np.ndarray) -> None:
        low = 1 << (value.bit_length() - 1)
        bucket = buckets.setdefault(low, Bucket(low=low, high=2 * low))
        bucket.tokens += len(losses)
        bucket.nats += float(losses.sum())

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token of this tokenizer."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which tokenizers share: nats / (ln 2 · bytes)."""
        return self.nats / (math.log(2) * self.text_bytes)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens [start, stop) of a document, of which the model scores those from `first` on."""

    start: int
    stop: int
    first: int


def windows(num_tokens: int, context: int) -> Iterator[Window]:
    """Windows of at most `context` tokens in which each token but the first is scored exactly once.

    They move on by half a context, so a token that is scored sees at least half of `context` before it (all there is, near the
    document's start). A window feeds tokens start..stop-1 and scores the predictions of tokens first..stop, one more than it feeds.
    """
    scored = 1
    start = 0
    step = max(1, context // 2)
    while scored < num_tokens:
        stop = min(start + context, num_tokens - 1)
        yield Window(start=start, stop=stop, first=scored)
        scored = stop + 1
        start += step


@torch.no_grad()
def document_losses(model: Transformer, tokens: np.ndarray, *, context: int, device: torch.device) -> np.ndarray:
    """fp64 losses in nats [tokens - 1] of tokens 1, 2, ... of one document, each scored once; see `windows`."""
    losses = np.full(len(tokens) - 1, np.nan)
    for group in _grouped(windows(len(tokens), context), max(1, _PASS_TOKENS // context)):
        pieces = [np.arange(window.start, window.stop) for window in group]
        labels = [np.where(piece + 1 >= window.first, tokens[piece + 1], IGNORE) for piece, window in zip(pieces, group, strict=True)]
        bounds = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int32)
        inputs = [
            torch.from_numpy(np.concatenate(part).astype(np.int64)).to(device)
            for part in ([tokens[piece] for piece in pieces], [np.arange(len(piece)) for piece in pieces], labels)
        ]
        found = model(inputs[0], inputs[1], torch.from_numpy(bounds), inputs[2]).double().cpu().numpy()
        for window, low, high in zip(group, bounds[:-1], bounds[1:], strict=True):
            losses[window.first - 1 : window.stop] = found[low:high][window.first - 1 - window.start :]
    return losses


def _grouped(items: Iterable[Window], size: int) -> Iterator[list[Window]]:
    group: list[Window] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
