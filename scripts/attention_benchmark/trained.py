"""Queries, keys and values as a trained model makes them: those of one layer of a checkpoint that reads text."""

import contextlib
import itertools

import numpy as np
import torch
from torch import Tensor

from configs.schema import BenchmarkConfig, ConfigError
from data.shards import Corpus
from model.transformer import Transformer
from scripts.evaluate import find_checkpoint
from train.evaluate import open_corpus
from train.initial import load_into, state_of, tokenizers_of


class _Reached(Exception):
    """The forward pass has come to the layer; no more of it is wanted."""


class Trained:
    """A model in bf16 on a device, which of its layers is asked, and the text it reads."""

    def __init__(self, model: Transformer, layer: int, tokens: np.ndarray) -> None:
        """`layer` is counted from 0, or from the last, -1; `tokens` `[n]` are ids, at least as many as will be asked for."""
        self.model = model
        self._layer = layer % len(model.layers)
        self._tokens = torch.from_numpy(tokens.astype(np.int64))

    @classmethod
    def open(cls, config: BenchmarkConfig, device: torch.device) -> "Trained":
        """The model of `config.checkpoint` with the attention and the positions of its last stage.

        Raises ConfigError for a checkpoint, layer or corpus that is not there, or text that is too short.
        """
        checkpoint = find_checkpoint(config.checkpoint)
        state = state_of(checkpoint)
        run, stage = state.run(), state.stage()
        count = run.model.num_layers
        if not -count <= config.layer < count:
            raise ConfigError(f"layer={config.layer}: the checkpoint's model has layers 0 to {count - 1}, or -{count} to -1 from the last")
        tokens = stream(open_corpus(config.data, tokenizers_of(checkpoint)), max(config.lengths))
        model = Transformer(run.model, stage.attention.per_layer(count), stage.rope, workspace=stage.attention.workspace)
        load_into(model, checkpoint)
        return cls(model.to(device, torch.bfloat16).eval(), config.layer, tokens)

    @torch.no_grad()
    def draw(self, bounds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """q `[T, Hq, D]`, k and v `[T, Hkv, D]` of the stream's first T tokens, cut into documents at `bounds` = `[0, ..., T]`.

        One forward pass up to the layer, however long: beyond the model's context positions go on as they began.
        """
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
            if layer == self._layer:
                found.append((q, k, v))
                raise _Reached

        device = self.model.embedding.weight.device
        positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(bounds)])
        with contextlib.suppress(_Reached), self.model.observed(keep):
            self.model.hidden(self._tokens[: bounds[-1]].to(device), positions.to(device), torch.tensor(bounds, dtype=torch.int32))
        return found[0]


def stream(corpus: Corpus, num_tokens: int) -> np.ndarray:
    """The first `num_tokens` ids of the longest held-out documents, one after the other, then of the longest training documents."""
    pieces: list[np.ndarray] = []
    missing = num_tokens
    for split in ("heldout", "train"):
        table = corpus.split(split)
        for document in np.argsort(-table.lengths, kind="stable"):
            if missing > 0:
                pieces.append(table.tokens(int(document), 0, missing))
                missing -= len(pieces[-1])
    if missing > 0:
        raise ConfigError(f"lengths={num_tokens}: the corpus of data.prepared_dir={corpus.folder} has {num_tokens - missing} tokens")
    return np.concatenate(pieces)
