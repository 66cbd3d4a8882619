"""The order of tokens and of rows: a pure function of (seed, epoch, position), whose state is a few integers.

An epoch is every document once, in an order shuffled by (seed, epoch), laid end to end; epochs follow each other without end.
Rows that follow each other there share a long document, so they are shuffled too. The stream is walked in *groups*, contiguous
stretches of about SHUFFLE_TOKENS; a group fills rows (`data.packing`), and its rows are visited in an order of its own. The next
group begins where it ends. Where row length or packing changes inside a group, the tokens not yet visited are joined in their
order, fill rows anew and are shuffled anew: the next *view* of the group. So batch and number of ranks may change at any row, row
length and packing too, and no token is held back, repeated or skipped.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from configs.schema import ConfigError, Packing
from data.packing import cut, fill, join

SHUFFLE_TOKENS = 2**26
"""Tokens among which rows are shuffled. Many steps and many of the longest documents, yet few enough that the order takes
milliseconds (32K rows of 2K) and that what is read of it (128 or 256 MiB) stays in the page cache until its last row.
Part of the order: a saved run goes on only under the same value. Unless packing is concat, a group ends with a document."""


@dataclass(frozen=True, order=True)
class Position:
    """A place in the stream: epoch, and offset in it in tokens, 0 <= offset < tokens of an epoch."""

    epoch: int = 0
    offset: int = 0


Place = TypeVar("Place")
"""Where a group begins: a Position, or whatever else a stream tells its places by; hashable."""


class Visit(NamedTuple):
    """A view of a group: its row length in tokens, how many of its rows are visited (some, not all), its packing."""

    seq_len: int
    rows: int
    packing: Packing = Packing.CONCAT


@dataclass(frozen=True)
class Progress(Generic[Place]):
    """What is visited: all before `start`, where a group begins, and some rows of each view of that group, the newest view last."""

    start: Place
    views: tuple[Visit, ...] = ()


class Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


Row = list[tuple[Place, int]]
"""A row as stretches of the stream: where each begins, and its tokens; what they do not fill is padding."""


class RowStream(ABC, Generic[Place]):
    """Documents laid end to end without end, as rows; `key` tells the orders of streams apart. What lies where, a subclass knows."""

    def __init__(self, key: tuple[int, ...]) -> None:
        self._key = key
        self._view = lru_cache(maxsize=2)(self._compute_view)

    beginning: Place
    """Where the stream begins."""

    @abstractmethod
    def advance(self, place: Place, num_tokens: int) -> Place:
        """The place `num_tokens` further on."""

    @abstractmethod
    def _number(self, place: Place) -> tuple[int, ...]:
        """Numbers that no other place has."""

    @abstractmethod
    def _group_end(self, start: Place, packing: Packing) -> int:
        """Where the group at `start` ends, in tokens from there."""

    @abstractmethod
    def _cut_at_documents(self, start: Place, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stretches in tokens from `start`, cut where documents end."""

    @abstractmethod
    def place_to_state(self, place: Place) -> dict[str, Any]:
        """A place as JSON values."""

    @abstractmethod
    def place_from_state(self, state: dict[str, Any]) -> Place:
        """The inverse."""

    def take(
        self, progress: Progress[Place], num_rows: int, seq_len: int, packing: Packing = Packing.CONCAT
    ) -> tuple[list[Row[Place]], Progress[Place]]:
        """The next `num_rows` rows of `seq_len` tokens after `progress`, and the progress after them."""
        taken: list[Row[Place]] = []
        while len(taken) < num_rows:
            earlier, visited = progress.views, 0
            if earlier and (earlier[-1].seq_len, earlier[-1].packing) == (seq_len, packing):
                earlier, visited = earlier[:-1], earlier[-1].rows
            view = self._view(progress.start, earlier, seq_len, packing)
            for stretches in view.rows_at(visited, num_rows - len(taken)):
                taken.append([(self.advance(progress.start, start), stop - start) for start, stop in stretches])
                visited += 1
            if visited < len(view.order):
                progress = Progress(progress.start, (*earlier, Visit(seq_len, visited, packing)))
            else:
                progress = Progress(self.advance(progress.start, view.end))
        return taken, progress

    def _compute_view(self, start: Place, earlier: tuple[Visit, ...], seq_len: int, packing: Packing) -> "_View":
        """The view of the group at `start` with rows of `seq_len`, after `earlier` views have visited their rows."""
        if earlier:
            parent = self._view(start, earlier[:-1], earlier[-1].seq_len, earlier[-1].packing)
            starts, stops, end = *parent.unvisited(earlier[-1].rows), parent.end
        else:
            end = self._group_end(start, packing)
            starts, stops = np.array([0]), np.array([end])
        added = 0

        def whole(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return (starts, stops) if packing is Packing.CONCAT else self._cut_at_documents(start, starts, stops)

        def follow(num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
            nonlocal added
            added = num_tokens
            return whole(np.array([end]), np.array([end + num_tokens]))

        filled = fill(*whole(starts, stops), seq_len, packing, follow)
        key = (*self._key, *self._number(start), len(earlier), seq_len)
        if packing is not Packing.CONCAT:
            key = (*key, list(Packing).index(packing))
        return _View(*filled[:3], _shuffled(filled.num_rows, *key), end + added)


class TokenStream(RowStream[Position]):
    """The endless stream over documents of the given lengths ([num_documents] int64, tokens, each at least 1).

    `key` tells streams of one seed apart.
    """

    def __init__(self, lengths: np.ndarray, *, seed: int, key: tuple[int, ...] = ()) -> None:
        if len(lengths) == 0:
            raise ConfigError("the split holds no documents")
        super().__init__((seed, *key))
        self.beginning = Position()
        self.lengths = lengths
        self.epoch_tokens = int(lengths.sum())
        self._order = lru_cache(maxsize=2)(self._compute_order)

    def advance(self, place: Position, num_tokens: int) -> Position:
        epochs, offset = divmod(place.offset + num_tokens, self.epoch_tokens)
        return Position(place.epoch + epochs, offset)

    def place_to_state(self, place: Position) -> dict[str, Any]:
        return {"epoch": place.epoch, "offset": place.offset}

    def place_from_state(self, state: dict[str, Any]) -> Position:
        return Position(state["epoch"], state["offset"])

    def pieces(self, row: Row[Position]) -> list[Piece]:
        """A row as pieces of documents."""
        found: list[Piece] = []
        for position, num_tokens in row:
            while num_tokens > 0:
                documents, ends = self._order(position.epoch)
                at = int(np.searchsorted(ends, position.offset, side="right"))
                document = int(documents[at])
                length = int(self.lengths[document])
                start = length - (int(ends[at]) - position.offset)
                stop = min(start + num_tokens, length)
                found.append(Piece(document, start, stop))
                num_tokens -= stop - start
                position = self.advance(position, stop - start)
        return found

    def num_document_ends(self, rows: list[Row[Position]]) -> int:
        """How many of the rows' tokens are the last of their document (and so predict nothing)."""
        total = 0
        for position, num_tokens in (stretch for row in rows for stretch in row):
            end = self.advance(position, num_tokens)
            total += (end.epoch - position.epoch) * len(self.lengths) + self._ends_before(end) - self._ends_before(position)
        return total

    def _ends_before(self, position: Position) -> int:
        return int(np.searchsorted(self._order(position.epoch)[1], position.offset, side="right"))

    def _compute_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the epoch's order, and where each ends in it (tokens): two arrays [num_documents] int64."""
        documents = _shuffled(len(self.lengths), *self._key, epoch)
        return documents, np.cumsum(self.lengths[documents])

    def _number(self, place: Position) -> tuple[int, ...]:
        return place.epoch, place.offset

    def _group_end(self, start: Position, packing: Packing) -> int:
        left = self.epoch_tokens - start.offset
        if left < 2 * SHUFFLE_TOKENS:  # no short group at the end: its rows would be neighbours
            return left
        if packing is Packing.CONCAT:
            return SHUFFLE_TOKENS
        ends = self._order(start.epoch)[1]
        return int(ends[np.searchsorted(ends, start.offset + SHUFFLE_TOKENS)]) - start.offset

    def _cut_at_documents(self, start: Position, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bounds, before, last = [], -start.offset, self.advance(start, int(stops[-1])).epoch
        for epoch in range(start.epoch, last + 1):
            ends = self._order(epoch)[1]
            low, high = np.searchsorted(ends, (starts[0] - before, stops[-1] - before))
            bounds.append(ends[low:high] + before)
            before += self.epoch_tokens
        return cut(starts, stops, np.concatenate(bounds))


class _View:
    """A group, or what is left of it, as rows. Stretches ([stretches] int64, in tokens from the group's start) are sorted by row.

    `order` holds the rows' numbers as they are visited, `end` is where the group ends.
    """

    def __init__(self, starts: np.ndarray, stops: np.ndarray, rows: np.ndarray, order: np.ndarray, end: int) -> None:
        self._starts, self._stops, self._rows = starts, stops, rows
        self.order, self.end = order, end

    def rows_at(self, first: int, count: int) -> list[list[tuple[int, int]]]:
        """The rows visited as number `first` and after, at most `count`: the stretches [start, stop) of each."""
        numbers = self.order[first : first + count]
        lows, highs = np.searchsorted(self._rows, numbers), np.searchsorted(self._rows, numbers, side="right")
        return [
            list(zip(self._starts[low:high].tolist(), self._stops[low:high].tolist(), strict=True))
            for low, high in zip(lows, highs, strict=True)
        ]

    def unvisited(self, visited: int) -> tuple[np.ndarray, np.ndarray]:
        """Ascending starts and stops of what is left after `visited` rows, joined where they meet."""
        left = np.ones(len(self.order), bool)
        left[self.order[:visited]] = False
        kept = left[self._rows]
        return join(np.sort(self._starts[kept]), np.sort(self._stops[kept]))


def _shuffled(count: int, *key: int) -> np.ndarray:
    """0..count-1 in an order drawn by `key`: [count] int64.

    Sorted by a hash of our own: no library's version can change the order under a saved run.
    """
    state = np.zeros(1, np.uint64)
    for number in key:
        state = _mix(state + np.uint64(number & (2**64 - 1)))
    return np.argsort(_mix(state + np.arange(count, dtype=np.uint64)), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014) on uint64, wrapping."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
