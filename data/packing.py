"""Filling rows: stretches of the stream to the rows that hold them. Pure functions of their arguments.

A stretch is [start, stop) in tokens from where its group begins. All arrays are [stretches] int64.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from configs.schema import Packing

_MAX_PADDING = 100
"""One part in so many of the tokens of best-fit rows may be padding: documents are cut where it would be more."""


class Filled(NamedTuple):
    """Stretches by the row that holds them, in a row ascending and joined where they meet; rows are 0..num_rows-1."""

    starts: np.ndarray
    stops: np.ndarray
    rows: np.ndarray
    num_rows: int


Follow = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""The stretches of so many tokens that follow a group, cut as those of the group are."""


def fill(starts: np.ndarray, stops: np.ndarray, seq_len: int, packing: Packing, follow: Follow) -> Filled:
    """Rows of `seq_len` tokens with all of the ascending stretches, and with what `follow` adds to fill the last.

    Unless packing is concat, a stretch must lie in one document: it is what stays whole where it fits into a row.
    """
    if packing is Packing.CONCAT:
        num_rows = -(-int((stops - starts).sum()) // seq_len)
        return _joined(*_lay(*_extended(starts, stops, num_rows * seq_len, follow), np.full(num_rows, seq_len)), num_rows)
    starts, stops = cut(starts, stops, _row_ends(starts, stops, seq_len))
    if packing is Packing.SEPARATE:
        return Filled(starts, stops, np.arange(len(starts)), len(starts))
    return _best_fit(starts, stops, seq_len, follow)


def cut(starts: np.ndarray, stops: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ascending stretches, cut at those of `bounds` that lie inside one."""
    at = np.searchsorted(stops, bounds, side="right")
    inside = at < len(stops)
    inside[inside] = starts[at[inside]] < bounds[inside]
    return np.union1d(starts, bounds[inside]), np.union1d(stops, bounds[inside])


def join(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending stretches, adjacent ones made one, empty ones left out."""
    starts, stops = starts[starts < stops], stops[starts < stops]
    apart = starts[1:] != stops[:-1]
    return starts[np.append(True, apart)], stops[np.append(apart, True)]


def _row_ends(starts: np.ndarray, stops: np.ndarray, seq_len: int) -> np.ndarray:
    """Where stretches longer than a row are cut: after each whole row of theirs."""
    cuts = (stops - starts - 1) // seq_len
    number = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    return np.repeat(starts, cuts) + (number + 1) * seq_len


def _extended(starts: np.ndarray, stops: np.ndarray, num_tokens: int, follow: Follow) -> tuple[np.ndarray, np.ndarray]:
    """The stretches, and after them what follows the group, `num_tokens` in all."""
    missing = num_tokens - int((stops - starts).sum())
    if not missing:
        return starts, stops
    more_starts, more_stops = follow(missing)
    return np.append(starts, more_starts), np.append(stops, more_stops)


def _best_fit(starts: np.ndarray, stops: np.ndarray, seq_len: int, follow: Follow) -> Filled:
    """Best fit decreasing: the longest stretch first, each into the fullest row that has room for it.

    Where more than a hundredth would be padding, as when all are longer than half a row, the emptiest rows are given up: their
    stretches are laid end to end into the gaps of the others, and what follows the group fills the rest where it has few rows.
    """
    lengths = stops - starts
    total, order = int(lengths.sum()), np.argsort(-lengths, kind="stable")
    rows = np.empty(len(starts), np.int64)
    rows[order], num_rows = _assign(lengths[order].tolist(), seq_len)
    if _MAX_PADDING * (num_rows * seq_len - total) <= num_rows * seq_len:
        return _joined(starts, stops, rows, num_rows)
    kept = max(_MAX_PADDING * total // ((_MAX_PADDING - 1) * seq_len), -(-total // seq_len))
    used = np.bincount(rows, lengths, num_rows).astype(np.int64)
    by_use = np.argsort(-used, kind="stable")
    number = np.empty(num_rows, np.int64)
    number[by_use] = np.arange(num_rows)
    rows = number[rows]
    stays = rows < kept
    loose = starts[~stays], stops[~stays]
    if _MAX_PADDING * (kept * seq_len - total) > kept * seq_len:
        loose = _extended(*loose, kept * seq_len - int(lengths[stays].sum()), follow)
    laid_starts, laid_stops, gap = _lay(*loose, (seq_len - used[by_use[:kept]])[::-1])  # the widest gap first: fewest cuts
    return _joined(np.append(starts[stays], laid_starts), np.append(stops[stays], laid_stops), np.append(rows[stays], kept - 1 - gap), kept)


def _assign(lengths: list[int], seq_len: int) -> tuple[list[int], int]:
    """The row of each stretch, of descending lengths of at most a row; and the number of rows."""
    rows: list[int] = []
    rooms: list[int] = []  # the room that is left in open rows, ascending, each once
    with_room: dict[int, list[int]] = {}
    num_rows = 0
    for length in lengths:
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = num_rows, seq_len
            num_rows += 1
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows.append(row)
        left = room - length
        if left in with_room:
            with_room[left].append(row)
        elif left:
            with_room[left] = [row]
            insort(rooms, left)
    return rows, num_rows


def _lay(starts: np.ndarray, stops: np.ndarray, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stretches laid end to end into gaps of so many tokens, cut where one is full: starts, stops and number of the gap."""
    ends, bounds = np.cumsum(stops - starts), np.cumsum(gaps)
    cuts = np.union1d(ends, bounds[bounds < ends[-1]])
    begins = np.append(0, cuts[:-1])
    within = np.searchsorted(ends, begins, side="right")
    laid = stops[within] - (ends[within] - begins)
    return laid, laid + (cuts - begins), np.searchsorted(bounds, begins, side="right")


def _joined(starts: np.ndarray, stops: np.ndarray, rows: np.ndarray, num_rows: int) -> Filled:
    """Sorted by row and start; stretches of one row that meet are one."""
    order = np.lexsort((starts, rows))
    starts, stops, rows = starts[order], stops[order], rows[order]
    apart = (starts[1:] != stops[:-1]) | (rows[1:] != rows[:-1])
    return Filled(starts[np.append(True, apart)], stops[np.append(apart, True)], rows[np.append(True, apart)], num_rows)
