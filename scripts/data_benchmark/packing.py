"""Filling rows with documents: the tokens a second that `data.stream` decides on, without reading any, and the padding that is left."""

import time
from pathlib import Path

import numpy as np

from configs.schema import DataBenchmarkConfig, Packing
from data.stream import SHUFFLE_TOKENS, Progress, Row, TokenStream
from scripts.data_benchmark.report import Measured

_ROWS = (2048, 32768)
_CORPORA = {"short documents": (600, 1.0), "long documents": (20_000, 1.3)}  # mean tokens, and sigma of their log-normal lengths


def packing(config: DataBenchmarkConfig, folder: Path) -> list[Measured]:
    """One group of documents of log-normal lengths into rows, by best fit, on one core."""
    figures = []
    for (kind, (mean, sigma)), seq_len in ((corpus, seq_len) for corpus in _CORPORA.items() for seq_len in _ROWS):
        drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, SHUFFLE_TOKENS // mean)
        stream = TokenStream(np.maximum(2, drawn).astype(np.int64), seed=0)
        start = time.perf_counter()
        rows, progress = stream.take(Progress(stream.beginning), 1, seq_len, Packing.BEST_FIT)
        seconds = time.perf_counter() - start
        while progress.views:  # the rest of the group, for its padding
            more, progress = stream.take(progress, 1, seq_len, Packing.BEST_FIT)
            rows += more
        tokens = sum(num_tokens for row in rows for _, num_tokens in row)
        cut = _share_cut(stream, rows, seq_len)
        note = f"padding {1 - tokens / (len(rows) * seq_len):.2%}; {cut:.2%} of the documents that fit into a row are cut"
        what = f"best fit, {kind} of {mean:,} tokens on average, rows of {seq_len:,}"
        figures.append(Measured(name=what, value=tokens / seconds / 1e6, unit="M tokens/s", target=">= 5M tokens/s", note=note))
    return figures


def _share_cut(stream: TokenStream, rows: list[Row], seq_len: int) -> float:
    pieces = np.sort([piece.document for row in rows for piece in stream.pieces(row)])
    times = np.bincount(pieces, minlength=len(stream.lengths))
    return float((times[stream.lengths <= seq_len] > 1).mean())
