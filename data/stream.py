"""The order of tokens: what comes at which position, as a pure function of (seed, epoch, offset).

An epoch is every document once, in an order shuffled by (seed, epoch), laid end to end; epochs follow each other without end.
A position is (epoch, offset in tokens). It is no count of rows or steps, so a run may change its row length, its batch or its
number of ranks anywhere and goes on where it was.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from configs.schema import ConfigError


@dataclass(frozen=True, order=True)
class Position:
    """A place in the stream: epoch, and offset in it in tokens, 0 <= offset < tokens of an epoch."""

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


class TokenStream:
    """The endless stream over documents of the given lengths ([num_documents] int64, tokens, each at least 1)."""

    def __init__(self, lengths: np.ndarray, *, seed: int) -> None:
        if len(lengths) == 0:
            raise ConfigError("the split holds no documents")
        self.lengths, self.seed = lengths, seed
        self.epoch_tokens = int(lengths.sum())
        self._order = lru_cache(maxsize=2)(self._compute_order)

    def advance(self, position: Position, num_tokens: int) -> Position:
        """The position `num_tokens` further on."""
        epochs, offset = divmod(position.offset + num_tokens, self.epoch_tokens)
        return Position(position.epoch + epochs, offset)

    def pieces(self, position: Position, num_tokens: int) -> list[Piece]:
        """The next `num_tokens` tokens as pieces of documents, across the end of an epoch where they reach it."""
        found: list[Piece] = []
        while num_tokens > 0:
            documents, ends = self._order(position.epoch)
            at = int(np.searchsorted(ends, position.offset, side="right"))
            document = int(documents[at])
            start = int(self.lengths[document]) - (int(ends[at]) - position.offset)
            stop = min(start + num_tokens, int(self.lengths[document]))
            found.append(Piece(document, start, stop))
            num_tokens -= stop - start
            position = self.advance(position, stop - start)
        return found

    def num_document_ends(self, position: Position, num_tokens: int) -> int:
        """How many of the next `num_tokens` tokens are the last of their document (and so predict nothing)."""
        end = self.advance(position, num_tokens)
        return (end.epoch - position.epoch) * len(self.lengths) + self._ends_before(end) - self._ends_before(position)

    def _ends_before(self, position: Position) -> int:
        return int(np.searchsorted(self._order(position.epoch)[1], position.offset, side="right"))

    def _compute_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the epoch's order, and where each ends in it (tokens): two arrays [num_documents] int64.

        Sorted by a hash of (seed, epoch, document) of our own: no library's version can change the order under a saved run.
        """
        key = _mix(_mix(np.array([self.seed & (2**64 - 1)], np.uint64)) + np.uint64(epoch))
        documents = np.argsort(_mix(key + np.arange(len(self.lengths), dtype=np.uint64)), kind="stable")
        return documents, np.cumsum(self.lengths[documents])


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014) on uint64, wrapping."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
