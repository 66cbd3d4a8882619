"""Packed rows: what a model is fed in one forward pass."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data.stream import Piece

IGNORE = -100
"""Label of a token that predicts nothing: the last of its document, and padding."""
PADDING = -1
"""What stands for a document where a row's end is padding."""


class Documents(Protocol):
    """The documents of a split: of a prepared corpus (`data.shards.DocumentTable`), or those in memory (`data.streaming`)."""

    name: str
    sources: list[str]

    @property
    def num_documents(self) -> int:
        """Numbered 0..num_documents-1."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, separators included: [num_documents] int64."""

    @property
    def source_numbers(self) -> np.ndarray:
        """The position in `sources` of each one's source: [num_documents]."""

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of one."""


class PieceOrigin(NamedTuple):
    """Where a piece comes from: its row in the batch, the document (or PADDING), and the document's token it starts at."""

    row: int
    document: int
    start: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of whole and cut documents; what they do not fill of a row is padding.

    A piece is a stretch of one document inside a row: attention, positions and MoBA's blocks stay inside it. A document that is cut
    goes on as a piece of some other row, often of another step; the last token before a cut still has the true next token as its label.
    Padding is a piece of its own: tokens 0, labels IGNORE.
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


def pack(table: Documents, rows: list[list[Piece]], seq_len: int, *, step_targets: int, masked_rows: int = 0) -> Batch:
    """A batch of `rows` of `seq_len` tokens, each the pieces that it holds.

    The last `masked_rows` rows are there for their shape alone: all their labels are IGNORE.
    """
    shape = (len(rows), seq_len)
    tokens, labels, positions = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64), np.empty(shape, np.int64)
    counted = np.arange(seq_len)
    bounds, origins = [0], []
    for number, row in enumerate(rows):
        at = 0
        for document, start, stop in row:
            end = at + stop - start
            # One token more than the piece, where the document has it: the label of the piece's last token.
            span = table.tokens(document, start, stop + 1)
            tokens[number, at:end] = span[: end - at]
            labels[number, at : at + len(span) - 1] = span[1:]
            positions[number, at:end] = counted[: end - at]
            bounds.append(number * seq_len + end)
            origins.append(PieceOrigin(number, document, start))
            at = end
        if at < seq_len:
            positions[number, at:] = counted[: seq_len - at]
            bounds.append((number + 1) * seq_len)
            origins.append(PieceOrigin(number, PADDING, 0))
    labels[len(rows) - masked_rows :] = IGNORE
    cu_seqlens = np.array(bounds, np.int32)
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_length=int(np.diff(cu_seqlens).max()),
        documents=tuple(origins),
        num_targets=int((labels != IGNORE).sum()),
        step_targets=step_targets,
    )
