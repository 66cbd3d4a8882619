"""What a model answers to the questions of `train.retrieval`: as it writes, and as it ranks the right answer among wrong ones."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.generate import Cursor, write_on
from model.transformer import Transformer
from train.retrieval import Ids, Sample


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one sample."""

    written: float | None
    """Share of the expected answers that the written text holds; None where none was written."""
    rank: int
    """1 + the candidates that are at least as likely a token as the right one (mean log-probability)."""
    loss: float
    """Mean loss of the right answer, in nats a token."""


@torch.inference_mode()
def answer(model: Transformer, sample: Sample, tokenizer: Tokenizer, *, write: bool) -> Answer:
    """Reads the prompt once, then each candidate and, where it shall `write`, its own greedy answer, behind it in the cache."""
    cursor = Cursor(model, capacity=sample.context)
    logits = cursor.advance(torch.from_numpy(sample.prompt.astype(np.int64)))
    place = cursor.mark()
    losses = []
    for candidate in sample.candidates:
        losses.append(_loss(cursor, logits, candidate))
        cursor.rewind(place)
    written = None
    if write:
        text = tokenizer.decode(write_on(cursor, logits, max_new_tokens=sample.room, eos_id=tokenizer.eos_id).tolist())
        written = sum(expected in text for expected in sample.answers) / len(sample.answers)
    return Answer(written=written, rank=1 + sum(loss <= losses[0] for loss in losses[1:]), loss=losses[0])


def _loss(cursor: Cursor, logits: Tensor, tokens: Ids) -> float:
    """Mean loss of `tokens` that come where `logits` stand, in nats."""
    total = 0.0
    for number, token in enumerate(tokens, start=1):
        total -= float(logits.double().log_softmax(dim=-1)[token])
        if number < len(tokens):
            logits = cursor.advance(torch.tensor([token]))
    return total / len(tokens)
