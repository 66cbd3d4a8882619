"""Packed rows: what a model is fed in one forward pass."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from data.shards import DocumentTable
from data.stream import Piece

IGNORE = -100
"""Label of a token that predicts nothing: the last of its document."""


class PieceOrigin(NamedTuple):
    """Where a piece comes from: its row in the batch, the document, and the document's token it starts at."""

    row: int
    document: int
    start: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of whole and cut documents, without padding.

    A piece is a stretch of one document inside a row: attention, positions and MoBA's blocks stay inside it. A document that is cut
    goes on as a piece of some other row, often of another step; the last token before a cut still has the true next token as its label.
    """

    tokens: torch.Tensor
    """Token ids, [rows, seq_len] int64."""
    labels: torch.Tensor
    """The next token of the same document, or IGNORE, [rows, seq_len] int64."""
    positions: torch.Tensor
    """Position in the piece, from 0, [rows, seq_len] int64."""
    cu_seqlens: torch.Tensor
    """Where pieces begin in the flattened rows, and the end: [num_pieces + 1] int32."""
    max_length: int
    """Tokens of the longest piece."""
    documents: tuple[PieceOrigin, ...]
    """Origin of each piece, [num_pieces]."""
    num_targets: int
    """Labels that are not IGNORE in this batch."""
    step_targets: int
    """Labels that are not IGNORE in the whole optimizer step, over its micro-batches and all ranks: the loss's denominator."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with tokens, labels and positions on `device`; cu_seqlens stay on the CPU, where attention reads them."""
        return replace(self, tokens=self.tokens.to(device), labels=self.labels.to(device), positions=self.positions.to(device))


def pack(table: DocumentTable, rows: list[list[Piece]], *, step_targets: int, masked_rows: int = 0) -> Batch:
    """A batch of `rows`, each the pieces that fill it; all rows hold the same number of tokens.

    The last `masked_rows` rows are there for their shape alone: all their labels are IGNORE.
    """
    pieces = [piece for row in rows for piece in row]
    lengths = np.array([piece.stop - piece.start for piece in pieces])
    # One token more than the piece, where the document has it: the label of the piece's last token.
    spans = [table.tokens(piece.document, piece.start, piece.stop + 1).astype(np.int64) for piece in pieces]
    tokens = np.concatenate([span[:length] for span, length in zip(spans, lengths, strict=True)]).reshape(len(rows), -1)
    labels = np.concatenate([_pad(span[1:], length) for span, length in zip(spans, lengths, strict=True)]).reshape(len(rows), -1)
    labels[len(rows) - masked_rows :] = IGNORE
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]).reshape(len(rows), -1)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        max_length=int(lengths.max()),
        documents=tuple(PieceOrigin(number, piece.document, piece.start) for number, row in enumerate(rows) for piece in row),
        num_targets=int((labels != IGNORE).sum()),
        step_targets=step_targets,
    )


def _pad(labels: np.ndarray, length: int) -> np.ndarray:
    return labels if len(labels) == length else np.append(labels, IGNORE)
