"""The order of tokens and of rows: a pure function of (seed, epoch, position), whose state is a few integers.

An epoch is every document once, in an order shuffled by (seed, epoch), laid end to end; epochs follow each other without end.
Rows that follow each other there share a long document, so they are shuffled too. The stream is walked in *groups*, contiguous
stretches of about SHUFFLE_TOKENS; a group is cut into rows, and its rows are visited in an order of its own. The next group begins
where it ends. Where the row length changes inside a group, the tokens not yet visited are joined in their order, cut into rows of
the new length and shuffled anew: the next *view* of the group. So batch and number of ranks may change at any row, the row length
too, and no token is padded, held back, repeated or skipped.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from configs.schema import ConfigError

SHUFFLE_TOKENS = 2**26
"""Tokens among which rows are shuffled. Many steps and many of the longest documents, yet few enough that the order takes
milliseconds (32K rows of 2K) and that what is read of it (128 or 256 MiB) stays in the page cache until its last row.
Part of the order: a saved run goes on only under the same value."""


@dataclass(frozen=True, order=True)
class Position:
    """A place in the stream: epoch, and offset in it in tokens, 0 <= offset < tokens of an epoch."""

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Progress:
    """What is visited: all before the position `start`, where a group begins, and some rows of that group.

    `views` has (seq_len, rows visited) for each view of the group, the newest last; each has visited some rows and not all.
    """

    start: Position = Position()
    views: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


Row = list[tuple[Position, int]]
"""A row as stretches of the stream: where each begins, and its tokens. One, unless the row length changed in this group."""


class TokenStream:
    """The endless stream over documents of the given lengths ([num_documents] int64, tokens, each at least 1)."""

    def __init__(self, lengths: np.ndarray, *, seed: int) -> None:
        if len(lengths) == 0:
            raise ConfigError("the split holds no documents")
        self.lengths, self.seed = lengths, seed
        self.epoch_tokens = int(lengths.sum())
        self._order = lru_cache(maxsize=2)(self._compute_order)
        self._view = lru_cache(maxsize=2)(self._compute_view)

    def advance(self, position: Position, num_tokens: int) -> Position:
        """The position `num_tokens` further on."""
        epochs, offset = divmod(position.offset + num_tokens, self.epoch_tokens)
        return Position(position.epoch + epochs, offset)

    def take(self, progress: Progress, num_rows: int, seq_len: int) -> tuple[list[Row], Progress]:
        """The next `num_rows` rows of `seq_len` tokens after `progress`, and the progress after them."""
        taken: list[Row] = []
        while len(taken) < num_rows:
            earlier, visited = progress.views, 0
            if earlier and earlier[-1][0] == seq_len:
                earlier, visited = earlier[:-1], earlier[-1][1]
            view = self._view(progress.start, earlier, seq_len)
            for stretches in view.rows_at(visited, num_rows - len(taken)):
                taken.append([(self.advance(progress.start, start), stop - start) for start, stop in stretches])
                visited += 1
            if visited < len(view.order):
                progress = Progress(progress.start, (*earlier, (seq_len, visited)))
            else:
                progress = Progress(self.advance(progress.start, view.end))
        return taken, progress

    def pieces(self, row: Row) -> list[Piece]:
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

    def num_document_ends(self, rows: list[Row]) -> int:
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
        documents = _shuffled(len(self.lengths), self.seed, epoch)
        return documents, np.cumsum(self.lengths[documents])

    def _compute_view(self, start: Position, earlier: tuple[tuple[int, int], ...], seq_len: int) -> "_View":
        """The view of the group at `start` with rows of `seq_len`, after `earlier` views have visited their rows."""
        if earlier:
            *before, (length, visited) = earlier
            parent = self._view(start, tuple(before), length)
            starts, stops, end = *parent.unvisited(visited), parent.end
        else:
            left = self.epoch_tokens - start.offset
            end = left if left < 2 * SHUFFLE_TOKENS else SHUFFLE_TOKENS  # no short group at the end: its rows would be neighbours
            starts, stops = np.array([0]), np.array([end])
        missing = -int((stops - starts).sum()) % seq_len  # the last row is filled from what follows the group
        starts, stops = _joined(np.append(starts, end), np.append(stops, end + missing))
        key = (self.seed, start.epoch, start.offset, len(earlier), seq_len)
        return _View(starts, stops, end + missing, seq_len, key)


class _View:
    """A group, or what is left of it, cut into rows. Offsets count tokens from the group's start.

    `order` holds the rows' numbers as they are visited, `end` is where the group ends.
    """

    def __init__(self, starts: np.ndarray, stops: np.ndarray, end: int, seq_len: int, key: tuple[int, ...]) -> None:
        ends = np.cumsum(stops - starts)  # where stretches end when they are laid end to end, which is where rows are cut
        cuts = np.union1d(ends, np.arange(seq_len, ends[-1] + 1, seq_len))
        begins = np.append(0, cuts[:-1])
        within = np.searchsorted(ends, begins, side="right")
        self._starts = stops[within] - (ends[within] - begins)
        self._stops = self._starts + (cuts - begins)
        self._rows = begins // seq_len  # of each stretch, ascending
        self.order = _shuffled(int(ends[-1]) // seq_len, *key)
        self.end = end

    def rows_at(self, first: int, count: int) -> list[list[tuple[int, int]]]:
        """The rows visited as number `first` and after, at most `count`: the stretches [start, stop) of each."""
        numbers = self.order[first : first + count]
        lows, highs = np.searchsorted(self._rows, numbers), np.searchsorted(self._rows, numbers, side="right")
        return [
            list(zip(self._starts[low:high].tolist(), self._stops[low:high].tolist(), strict=True))
            for low, high in zip(lows, highs, strict=True)
        ]

    def unvisited(self, visited: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and stops of what is left after `visited` rows."""
        left = np.ones(len(self.order), bool)
        left[self.order[:visited]] = False
        return self._starts[left[self._rows]], self._stops[left[self._rows]]


def _joined(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending stretches [start, stop), adjacent ones made one, empty ones left out."""
    starts, stops = starts[starts < stops], stops[starts < stops]
    apart = starts[1:] != stops[:-1]
    return starts[np.append(True, apart)], stops[np.append(apart, True)]


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
