"""Filling rows: what holds for any stretches, beside a plain best fit written anew."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Packing
from data.packing import _assign, cut, fill, join
from data.stream import Position, Progress, TokenStream

QUICK = settings(max_examples=100, deadline=None)
lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def stretches_of(lengths, gaps):
    """Ascending stretches of those lengths, apart from one another by `gaps` (taken again and again)."""
    starts, at = [], 0
    for index, length in enumerate(lengths):
        at += gaps[index % len(gaps)]
        starts.append(at)
        at += length
    return np.array(starts), np.array(starts) + np.array(lengths)


def rows_of(filled):
    """The stretches of each row."""
    rows = [[] for _ in range(filled.num_rows)]
    for start, stop, row in zip(filled.starts.tolist(), filled.stops.tolist(), filled.rows.tolist(), strict=True):
        rows[row].append((start, stop))
    return rows


@QUICK
@given(
    lengths=lengths_of,
    gaps=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    seq_len=st.integers(1, 50),
    packing=st.sampled_from(Packing),
)
def test_every_token_is_in_one_row_and_rows_hold_what_they_can(lengths, gaps, seq_len, packing):
    starts, stops = stretches_of(lengths, gaps)
    end, added = int(stops[-1]), []

    def follow(num_tokens):
        added.append(num_tokens)
        return np.array([end]), np.array([end + num_tokens])

    filled = fill(starts, stops, seq_len, packing, follow)
    assert len(added) <= 1 and sorted(set(filled.rows.tolist())) == list(range(filled.num_rows))
    tokens = sorted(token for row in rows_of(filled) for start, stop in row for token in range(start, stop))
    expected = [token for start, stop in zip(starts, stops, strict=True) for token in range(start, stop)]
    assert tokens == expected + list(range(end, end + sum(added)))
    for row in rows_of(filled):
        assert row == sorted(row) and sum(stop - start for start, stop in row) <= seq_len
        assert all(stop < start for (_, stop), (start, _) in pairwise(row))  # joined where they meet
    room = filled.num_rows * seq_len
    if packing is Packing.CONCAT:
        assert len(tokens) == room
    elif packing is Packing.BEST_FIT:
        assert 100 * (room - len(tokens)) <= room and sum(added) < seq_len
    else:
        assert filled.num_rows == sum(-(-length // seq_len) for length in lengths) and not added
        assert all(len(row) == 1 for row in rows_of(filled))
        whole = sum(length // seq_len for length in lengths)
        assert sum(stop - start == seq_len for ((start, stop),) in rows_of(filled)) == whole


@QUICK
@given(lengths=st.lists(st.integers(1, 50), max_size=60), seq_len=st.just(50))
def test_best_fit_is_that_of_the_definition(lengths, seq_len):
    """Each into the fullest row that has room, longest first: the rooms that are left are those of a plain search over all rows."""
    lengths = sorted(lengths, reverse=True)
    rows, num_rows = _assign(lengths, seq_len)
    rooms = []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(seq_len - length)
    used = np.bincount(np.array(rows, np.int64), np.array(lengths), num_rows)
    assert sorted(rooms) == sorted((seq_len - used).tolist())


def test_documents_stay_whole_where_little_is_padding():
    """Documents of half rows and quarters fill rows exactly: none is cut but the long one, after its whole rows."""
    lengths = [50, 25, 25, 50, 230, 25, 25, 70]
    starts, stops = stretches_of(lengths, [1])
    filled = fill(starts, stops, 100, Packing.BEST_FIT, lambda n: pytest.fail("nothing is missing"))
    found = sorted(zip(filled.starts.tolist(), filled.stops.tolist(), strict=True))
    long = int(starts[4])
    expected = [pair for pair in zip(starts.tolist(), stops.tolist(), strict=True) if pair[0] != long]
    assert found == sorted([*expected, (long, long + 100), (long + 100, long + 200), (long + 200, long + 230)])
    assert filled.num_rows == 5


def test_of_documents_longer_than_half_a_row_no_more_is_cut_than_fills_the_others():
    starts, stops = stretches_of([60] * 1000, [1])
    filled = fill(starts, stops, 100, Packing.BEST_FIT, lambda n: pytest.fail("nothing is missing"))
    assert filled.num_rows == 606  # 60,000 tokens and at most a hundredth of padding
    whole = sum(stop - start == 60 for row in rows_of(filled) for start, stop in row)
    assert whole == 606


@QUICK
@given(lengths=lengths_of, gaps=st.lists(st.integers(0, 3), min_size=1, max_size=5), bounds=st.sets(st.integers(0, 500)))
def test_cut_and_join(lengths, gaps, bounds):
    starts, stops = stretches_of(lengths, gaps)
    cut_starts, cut_stops = cut(starts, stops, np.array(sorted(bounds), np.int64))
    expected = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        points = [start, *sorted(bound for bound in bounds if start < bound < stop), stop]
        expected += list(pairwise(points))
    assert list(zip(cut_starts.tolist(), cut_stops.tolist(), strict=True)) == expected
    assert [array.tolist() for array in join(cut_starts, cut_stops)] == [array.tolist() for array in join(starts, stops)]
    joined = list(zip(*(array.tolist() for array in join(starts, stops)), strict=True))
    assert all(stop < start for (_, stop), (start, _) in pairwise(joined))


@QUICK
@given(
    lengths=lengths_of,
    changes=st.lists(st.tuples(st.integers(1, 50), st.sampled_from(Packing), st.integers(1, 9)), min_size=1, max_size=6),
    group=st.sampled_from([20, 150, 2**26]),
    seed=st.integers(0, 2**63),
)
def test_any_change_of_length_and_packing_repeats_and_skips_nothing(lengths, changes, group, seed):
    """What is visited, and then the rest of the group, is the stream's beginning: each place once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.stream.SHUFFLE_TOKENS", group)
        stream, progress, rows = TokenStream(np.array(lengths), seed=seed), Progress(Position()), []
        for seq_len, packing, count in changes:
            taken, progress = stream.take(progress, count, seq_len, packing)
            assert all(sum(n for _, n in row) <= seq_len for row in taken)
            if packing is Packing.SEPARATE:
                assert all(len(stream.pieces(row)) == 1 for row in taken)
            rows += taken
        while progress.views:
            taken, progress = stream.take(progress, 1, *changes[-1][:2])
            rows += taken
    total = sum(lengths)
    places = sorted(position.epoch * total + position.offset + i for row in rows for position, n in row for i in range(n))
    assert places == list(range(progress.start.epoch * total + progress.start.offset))
