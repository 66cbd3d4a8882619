"""How much of the held-out documents also stands in training documents: 13-grams of tokens that both have.

Documents whose text is the same never are on both sides; this finds what is copied within them. A window is 13 tokens of the corpus's
tokenizer (about 10 words; GPT-3 took 13 words, arXiv 2005.14165, appendix C) inside one document, separators left out.
Windows are compared by a hash of 64 bits: one that stands nowhere else is found among 10^11 training windows with a chance of 5e-9.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.shards import Corpus, DocumentTable

WINDOW = 13
"""Tokens of a window."""
_STRIP = 1 << 20  # tokens hashed at a time
_HELDOUT_WINDOWS = 1 << 26  # held in memory at a time, 8 bytes each and as much again beside them; each such batch is a pass over training
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Contaminated:
    """A held-out document that shares windows with training documents: how many of how many, and the first of those documents.

    `at` is the token at which the longest shared stretch begins in it, of `length` tokens.
    """

    document: int
    shared: int
    windows: int
    training_document: int
    at: int
    length: int


@dataclass(frozen=True)
class Contamination:
    """`documents` lists the held-out documents that share windows, the largest share first; the counts are of all held-out documents."""

    documents: list[Contaminated]
    num_documents: int
    shared: int
    windows: int


def contamination(corpus: Corpus, progress: Callable[[int, int], None] = lambda done, total: None) -> Contamination:
    """The held-out documents of `corpus` against its training documents; `progress` is called with tokens of those done, and in all."""
    heldout, train = corpus.split("heldout"), corpus.split("train")
    separators = np.array(sorted({corpus.manifest.bos_id, corpus.manifest.eos_id}))
    found: list[Contaminated] = []
    windows = 0
    batches = list(_batches(heldout.lengths))
    for number, (first, stop) in enumerate(batches):
        hashes = [_hashes(heldout.tokens(document)[1:-1]) for document in range(first, stop)]
        windows += sum(map(len, hashes))
        known = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
        origin = _search(known, train, separators, partial(_report, progress, number, len(batches), train.num_tokens))
        for document, own in enumerate(hashes, first):
            where = origin[np.searchsorted(known, own)]
            hits = where >= 0
            if hits.any():
                at, length = _longest(hits)
                found.append(Contaminated(document, int(hits.sum()), len(own), int(where[at]), at + 1, length + WINDOW - 1))
    found.sort(key=lambda item: (-item.shared / item.windows, item.document))
    return Contamination(found, heldout.num_documents, sum(item.shared for item in found), windows)


def _report(progress: Callable[[int, int], None], batch: int, batches: int, tokens: int, done: int) -> None:
    progress(batch * tokens + done, batches * tokens)


def _batches(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches of documents [first, stop) of at most `_HELDOUT_WINDOWS` tokens, but at least one document."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        begin = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, begin + _HELDOUT_WINDOWS, side="right")))
        yield first, stop
        first = stop


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """The hash of the window that begins at each token: [len(tokens) - 12] uint64, none where there are fewer tokens than a window has."""
    count = max(0, len(tokens) - WINDOW + 1)
    wide = tokens.astype(np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(WINDOW):  # a polynomial, modulo 2^64, of ids that a multiplication has spread
        hashes = hashes * np.uint64(0x100000001B3) + (wide[offset : offset + count] + np.uint64(1)) * _FACTOR
    hashes ^= hashes >> np.uint64(29)  # mixed, since the filter below goes by the upper bits alone
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(32))


def _search(known: np.ndarray, train: DocumentTable, separators: np.ndarray, progress: Callable[[int], None]) -> np.ndarray:
    """For each of the `known` hashes (ascending) the first training document that has it, or -1: [len(known)] int64."""
    origin = np.full(len(known), -1)
    bits = min(28, max(10, (16 * len(known)).bit_length()))
    filter_shift = np.uint64(64 - bits)
    may_hold = np.zeros(1 << bits, bool)  # by the upper bits: spares nearly every window the search
    may_hold[known >> filter_shift] = True
    ends = np.cumsum(train.lengths)
    done = 0
    for number in range(len(train.counts.shards)):
        shard = train.shard(number)
        for begin in range(0, len(shard), _STRIP):
            tokens = np.asarray(shard[begin : begin + _STRIP + WINDOW - 1])
            hashes = _hashes(tokens)
            marks = np.append(0, np.cumsum(np.isin(tokens, separators)))
            candidates = np.flatnonzero(may_hold[hashes >> filter_shift] & (marks[WINDOW:] == marks[:-WINDOW]))
            slots = np.searchsorted(known, hashes[candidates])
            held = np.flatnonzero(slots < len(known))
            held = held[known[slots[held]] == hashes[candidates[held]]][
                ::-1
            ]  # the last assignment to a slot holds: that of the first place
            new = held[origin[slots[held]] < 0]
            origin[slots[new]] = np.searchsorted(ends, done + begin + candidates[new], side="right")
            progress(done + min(begin + _STRIP, len(shard)))
        done += len(shard)
    return origin


def _longest(hits: np.ndarray) -> tuple[int, int]:
    """Where the longest run of True begins, and its length."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], hits, [False])).astype(np.int8)))
    starts, stops = edges[::2], edges[1::2]
    best = int(np.argmax(stops - starts))
    return int(starts[best]), int(stops[best] - starts[best])
