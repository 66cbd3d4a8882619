"""Loss on held-out text: a few fixed rows inside the loop, and whole long documents for `scripts.evaluate`."""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.layers import LayerAttention
from configs.schema import ConfigError, DataConfig, EvaluateConfig, EvaluationPart, RopeScaling, RunConfig, StageConfig, StretchConfig
from data.loader import IGNORE, Batch
from data.shards import Corpus, DocumentTable
from data.tokenizer import Tokenizer
from model.transformer import Transformer
from train.distributed import Ranks, gather_objects, sum_over_ranks
from train.engine import Engine

Advance = Callable[[int], None]
"""Called with the number of tokens that have been scored since the last call."""

# Tokens in one forward pass of a document evaluation, where the context is shorter.
PASS_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class HeldoutLosses:
    """Losses of the held-out rows, which are the same rows in every run on a corpus.

    A token's position is how many of its document's come before it in its row; bucket i has positions [i * bucket, (i + 1) * bucket).
    """

    bucket: int
    nats: np.ndarray
    """fp64 [rows, buckets]: sums over targets."""
    targets: np.ndarray
    """int64 [rows, buckets]: their number."""
    checksums: Sequence[int]
    """CRC-32 of each row's targets: those of two runs agree where their rows are the same text under the same tokenizer."""
    documents: Sequence[Sequence[int]]
    """Numbers of the held-out documents that each row's tokens are of, the one with most tokens first."""

    @property
    def loss(self) -> float:
        """Mean in nats a target."""
        return float(self.nats.sum() / self.targets.sum())

    @property
    def by_position(self) -> dict[int, float]:
        """Means by their bucket's first position, where there are targets."""
        counts, sums = self.targets.sum(axis=0), self.nats.sum(axis=0)
        return {index * self.bucket: float(sums[index] / count) for index, count in enumerate(counts.tolist()) if count}

    def to_mapping(self) -> dict[str, Any]:
        """For JSON; nats to 1e-4, which is below 1e-6 a token of any row."""
        return {
            "position_bucket": self.bucket,
            "checksums": list(self.checksums),
            "documents": [list(row) for row in self.documents],
            "targets": self.targets.tolist(),
            "nats": [[round(value, 4) for value in row] for row in self.nats.tolist()],
        }


def heldout_losses(engine: Engine, batches: Sequence[Batch], ranks: Ranks, *, bucket: int) -> HeldoutLosses:
    """Losses of the held-out rows of all ranks, which hold equally many `batches` of a row each, as `heldout_rows` deals them out."""
    num_buckets = -(-batches[0].tokens.shape[1] // bucket)
    sharing = engine.module.sequence_parallel
    degree = sharing.degree if sharing else 1
    groups = ranks.world_size // degree
    # Of each row: nats and targets by bucket, and its checksum. A rank fills in what it has, and all are summed.
    filled = torch.zeros(len(batches), groups, 2 * num_buckets + 1, dtype=torch.float64, device=ranks.device)
    for own, batch in zip(filled[:, ranks.rank // degree], batches, strict=True):
        own[-1] = zlib.crc32(batch.labels.numpy().tobytes()) / degree
        batch = batch.to(ranks.device)
        labels, positions = batch.labels.flatten(), batch.positions.flatten()
        if sharing:
            labels, positions = sharing.own_tokens(labels), sharing.own_tokens(positions)
        counted = labels != IGNORE
        number = positions[counted] // bucket
        own[:num_buckets] = torch.bincount(number, engine.losses(batch)[counted].double(), num_buckets)
        own[num_buckets:-1] = torch.bincount(number, minlength=num_buckets)
    summed = np.array(sum_over_ranks(filled.flatten().tolist(), ranks.device)).reshape(len(batches) * groups, -1)
    nats, targets = summed[:, :num_buckets], np.rint(summed[:, num_buckets:-1]).astype(np.int64)
    is_row = targets.any(axis=1)  # what fills up has no targets
    assert targets.sum() == batches[0].step_targets
    checksums = [round(value) for value in summed[is_row, -1].tolist()]
    told = gather_objects([_documents(batch) for batch in batches])[::degree]  # in the order of `filled`, with what fills up
    documents = [row for rows in zip(*told, strict=True) for row in rows]
    return HeldoutLosses(
        bucket=bucket,
        nats=nats[is_row],
        targets=targets[is_row],
        checksums=checksums,
        documents=[row for row, counts in zip(documents, is_row, strict=True) if counts],
    )


def _documents(batch: Batch) -> list[int]:
    """Numbers of the documents of a batch, the one with most tokens first."""
    tokens: Counter[int] = Counter()
    for origin, length in zip(batch.documents, batch.cu_seqlens.diff().tolist(), strict=True):
        tokens[origin.document] += length
    return [number for number, _ in tokens.most_common()]


AttentionSettings = dict[str, tuple[LayerAttention, ...]]
"""Label to the attention of each layer."""


def attention_settings(config: EvaluateConfig, run: RunConfig, stage: StageConfig) -> AttentionSettings:
    """The settings to try on a checkpoint of `stage`, equal ones once; a bare `moba` has the stage's block size and top-k.

    Raises ConfigError for a rule that cannot be read or does not fit the model's layers.
    """
    found: AttentionSettings = {}
    for index, rule in enumerate(config.attentions or (stage.attention.rule,)):
        try:
            layers = replace(stage.attention, rule=rule).per_layer(run.model.num_layers)
        except ConfigError as error:
            raise ConfigError(f"attentions.{index}: {error}") from None
        if layers not in found.values():
            found[attention_label(rule, layers)] = layers
    return found


def attention_label(rule: str, layers: Sequence[LayerAttention]) -> str:
    """The rule as it was given, or where all layers are alike their attention in full: `moba(64, 3)` for `moba`."""
    return str(layers[0]) if len(set(layers)) == 1 else rule


def stretch(stage: StageConfig, run: RunConfig, wanted: StretchConfig) -> StageConfig:
    """The stage with its positions taken further, as evaluation is told to. Raises ConfigError where it has another scaling already."""
    rope = stage.rope
    if wanted.scaling is RopeScaling.NONE:
        return stage
    if rope.scaling is not RopeScaling.NONE:
        if rope.scaling is not wanted.scaling:
            raise ConfigError(
                f"rope.scaling={wanted.scaling.value}: the checkpoint has scaling={rope.scaling.value}, which alone can go on"
            )
        return replace(stage, rope=replace(rope, factor=rope.factor * wanted.factor))
    original = run.model.max_seq_len if wanted.scaling in (RopeScaling.YARN, RopeScaling.LLAMA3) else 0
    return replace(stage, rope=replace(rope, scaling=wanted.scaling, factor=wanted.factor, original_max_seq_len=original))


def context_lengths(config: EvaluateConfig, run: RunConfig, stage: StageConfig, settings: AttentionSettings) -> tuple[int, ...]:
    """The context lengths to try on a checkpoint of `stage`, in tokens, equal ones once.

    Raises ConfigError for one that the model has no positions for under one of the `settings`, and where none is above
    `suite.gain_from`.
    """
    contexts = tuple(dict.fromkeys(config.contexts or (stage.seq_len,)))
    max_seq_len = run.model.max_seq_len
    for label, layers in settings.items():
        limit = stage.rope.max_context(max_seq_len, layers)
        for context in contexts:
            if limit is not None and context > limit:
                named = RopeScaling.YARN if stage.rope.scaling is RopeScaling.NONE else stage.rope.scaling
                reached = (stage.rope.original_max_seq_len or max_seq_len) * stage.rope.factor * stage.rope.interpolation
                raise ConfigError(
                    f"contexts={context}: is beyond the {limit} tokens that the checkpoint's RoPE is set up for under {label} "
                    f"(model.max_seq_len={max_seq_len}); rope.scaling={named.value} rope.factor={math.ceil(context / reached)} would "
                    "allow it"
                )
    if config.suite.gain_from >= max(contexts):
        raise ConfigError(f"suite.gain_from={config.suite.gain_from}: must be below one of contexts={list(contexts)}")
    return contexts


def open_corpus(data: DataConfig, tokenizers: Sequence[str]) -> Corpus:
    """The corpus, once it is sure that the checkpoint reads its tokens as they were meant: its tokenizer's hash is one of `tokenizers`
    (none: nothing is known). Raises ConfigError."""
    if data.streaming:
        raise ConfigError(
            "data.streaming=true: evaluation reads a prepared corpus; prepare a part of the sources (max_documents) with the same "
            "tokenizer and heldout_fraction, whose held-out documents are none that training on the stream has seen"
        )
    corpus = Corpus.open(data.prepared_dir)
    if tokenizers and corpus.tokenizer_hash not in tokenizers:
        raise ConfigError(
            f"data.prepared_dir={data.prepared_dir}: has tokenizer {corpus.tokenizer_hash}, the checkpoint was trained with "
            f"{' or '.join(tokenizers)}; name the corpus it was trained on, or one prepared with its tokenizer"
        )
    return corpus


@dataclass(frozen=True, kw_only=True)
class Document:
    """A held-out document as it is scored: its ids [tokens] from the bos on, and the UTF-8 bytes of the text they spell.

    A document that is cut short has lost its eos, and a character that the cut parts counts no bytes.
    """

    number: int
    tokens: np.ndarray
    text_bytes: int
    is_cut: bool


def choose_documents(corpus: Corpus, config: EvaluateConfig) -> list[Document]:
    """The longest held-out documents that `config` lets through, longest first, equally long ones by number.

    Raises ConfigError where there are none.
    """
    table = corpus.split("heldout")
    if table.num_documents == 0:
        where = f"data.prepared_dir={config.data.prepared_dir}"
        raise ConfigError(f"{where}: has no held-out documents; prepare it with data.heldout_fraction above 0")
    lengths = table.lengths
    ranked = np.argsort(-lengths, kind="stable")
    chosen = [int(number) for number in ranked if lengths[number] >= max(config.min_document_tokens, 2)]
    if not chosen:
        raise ConfigError(
            f"min_document_tokens={config.min_document_tokens}: leaves none of the {table.num_documents} held-out documents, "
            f"whose longest has {lengths.max()} tokens"
        )
    limit = config.max_document_tokens or int(lengths.max())
    return [_read(table, number, limit, corpus.tokenizer) for number in chosen[: config.max_documents or None]]


def reached_contexts(config: EvaluateConfig, contexts: Sequence[int], documents: Sequence[Document]) -> tuple[int, ...]:
    """Those of `contexts`, in tokens, that the longest of `documents` fills: beyond it all have the figures of whole documents.

    Where the checkpoint's own context is meant and none fills it, the length of the longest. Raises ConfigError where `contexts` of the
    config are all beyond, and no part is asked for that does without documents.
    """
    longest = max(len(document.tokens) for document in documents)
    reached = tuple(context for context in contexts if context <= longest)
    if reached or not config.contexts:
        return reached or (longest,)
    if set(config.suite.parts) <= {EvaluationPart.PERPLEXITY, EvaluationPart.GATES}:
        raise ConfigError(
            f"contexts={','.join(map(str, contexts))}: no scored document is that long, the longest has {longest} tokens; lower it, raise "
            "max_document_tokens where that cuts, or hold out longer documents"
        )
    return ()


def _read(table: DocumentTable, number: int, limit: int, tokenizer: Tokenizer) -> Document:
    tokens = table.tokens(number, 0, limit)
    is_cut = len(tokens) < int(table.lengths[number])
    text_bytes = len(tokenizer.decode(tokens).rstrip("\ufffd").encode()) if is_cut else table.byte_length(number)
    return Document(number=number, tokens=tokens, text_bytes=text_bytes, is_cut=is_cut)


@dataclass(kw_only=True)
class Bucket:
    """Tokens whose measure (position, document length) lies in [low, high), what they cost, and the documents they are from."""

    low: int
    high: int
    documents: int = 0
    tokens: int = 0
    nats: float = 0.0

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


@dataclass(kw_only=True)
class Scores:
    """Losses of held-out documents under one attention setting and one context length.

    Buckets are powers of two, by their lower bound. Positions count tokens from a document's bos, which is position 0 and
    is not scored; lengths are in scored documents' tokens, bos and eos included.
    """

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    by_position: dict[int, Bucket] = field(default_factory=dict)
    by_length: dict[int, Bucket] = field(default_factory=dict)
    documents: list[np.ndarray] = field(default_factory=list)
    """fp32 losses of each document's tokens 1, 2, ..."""

    def add(self, losses: np.ndarray, text_bytes: int) -> None:
        """One document: fp64 losses [tokens - 1] of its tokens 1, 2, ..., and the UTF-8 bytes of the text they spell."""
        self.nats += float(losses.sum())
        self.tokens += len(losses)
        self.text_bytes += text_bytes
        self.documents.append(losses.astype(np.float32))
        self._count(self.by_length, len(losses) + 1, losses)
        for power in range(len(losses).bit_length()):  # the last position is len(losses)
            low, high = 1 << power, 2 << power
            self._count(self.by_position, low, losses[low - 1 : high - 1])

    @staticmethod
    def _count(buckets: dict[int, Bucket], value: int, losses: np.ndarray) -> None:
        low = 1 << (value.bit_length() - 1)
        bucket = buckets.setdefault(low, Bucket(low=low, high=2 * low))
        bucket.documents += 1
        bucket.tokens += len(losses)
        bucket.nats += float(losses.sum())

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token of this tokenizer."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which tokenizers share: nats / (ln 2 · bytes).

        The eos counts in the nats and not in the bytes: where a text ends is part of what has to be predicted.
        """
        return self.nats / (math.log(2) * self.text_bytes) if self.text_bytes else math.inf


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What a longer context is worth: losses of the same tokens under it and under a shorter one, in nats."""

    short: float
    long: float
    standard_error: float
    """Of the difference of the means; documents are what is drawn, so tokens of one document count as one."""
    tokens: int
    documents: int

    @property
    def gain(self) -> float:
        """Nats per token."""
        return self.short - self.long


def gain(short: Scores, long: Scores, context: int) -> Gain | None:
    """Gain of `long`, scored in a `context` of so many tokens, over `short`, on the tokens that have at least half of it before them;
    None where no document has one."""
    first = max(1, context // 2) - 1  # of the losses, which begin with token 1
    both = zip(short.documents, long.documents, strict=True)
    pairs = [(under_short[first:], under_long[first:]) for under_short, under_long in both if len(under_long) > first]
    if not pairs:
        return None
    counts = np.array([len(losses) for _, losses in pairs], float)
    sums = np.array([[losses.sum(dtype=float) for losses in pair] for pair in pairs])
    means = sums.sum(axis=0) / counts.sum()
    apart = sums[:, 0] - sums[:, 1] - counts * (means[0] - means[1])
    error = math.sqrt(np.square(apart).sum()) / counts.sum()
    return Gain(short=means[0], long=means[1], standard_error=error, tokens=int(counts.sum()), documents=len(pairs))


def perplexity(loss: float) -> float:
    """exp of a loss in nats; inf where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens [start, stop) of a document, fed to the model; scored are the predictions of tokens first..stop."""

    start: int
    stop: int
    first: int


def windows(num_tokens: int, context: int) -> Iterator[Window]:
    """Windows of at most `context` tokens in which each token but the document's first is scored exactly once.

    They move on by half a context, so a scored token has more than half of `context` before it in its window, or all there
    is before it in the document.
    """
    scored = 1
    start = 0
    step = max(1, context // 2)
    while scored < num_tokens:
        stop = min(start + context, num_tokens - 1)  # the last token is predicted and predicts nothing
        yield Window(start=start, stop=stop, first=scored)
        scored = stop + 1
        start += step


def score(
    model: Transformer, documents: Sequence[Document], *, context: int, device: torch.device, advance: Advance = lambda tokens: None
) -> Scores:
    """Scores of `documents` (at least one) in windows of `context` tokens, under the attention that the model is set to."""
    scores = Scores()
    for document in documents:
        scores.add(document_losses(model, document.tokens, context=context, device=device, advance=advance), document.text_bytes)
    return scores


@torch.no_grad()
def document_losses(
    model: Transformer, tokens: np.ndarray, *, context: int, device: torch.device, advance: Advance = lambda tokens: None
) -> np.ndarray:
    """fp64 losses in nats [tokens - 1] of tokens 1, 2, ... of one document, each scored once; see `windows`.

    Windows are packed as documents of their own: positions count, and MoBA's blocks begin, at a window's first token.
    """
    tokens = tokens.astype(np.int64)  # shards hold uint16, in which IGNORE would wrap around
    losses = np.full(len(tokens) - 1, np.nan)
    for group in _grouped(windows(len(tokens), context), max(1, PASS_TOKENS // context)):
        places = [np.arange(window.start, window.stop) for window in group]
        labels = [np.where(place + 1 >= window.first, tokens[place + 1], IGNORE) for place, window in zip(places, group, strict=True)]
        bounds = np.cumsum([0, *map(len, places)])
        fed, positions, targets = (
            torch.from_numpy(np.concatenate(part)).to(device)
            for part in ([tokens[place] for place in places], [np.arange(len(place)) for place in places], labels)
        )
        found = _all_losses(model, fed, positions, torch.from_numpy(bounds.astype(np.int32)), targets).double().cpu().numpy()
        for window, low, high in zip(group, bounds, bounds[1:]):
            losses[window.first - 1 : window.stop] = found[low:high][window.first - 1 - window.start :]
        advance(group[-1].stop - group[0].first + 1)
    return losses


def _all_losses(model: Transformer, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, labels: Tensor) -> Tensor:
    """fp32 losses [N] of all tokens, on every rank where ranks share them; a document of padding makes their number divide."""
    ranks = model.sequence_parallel
    if ranks is None:
        return model(tokens, positions, cu_seqlens, labels)
    num_tokens, spare = len(tokens), -len(tokens) % ranks.degree
    if spare:
        tokens, positions, labels = (pad(part, (0, spare)) for part in (tokens, positions, labels))
        cu_seqlens = pad(cu_seqlens, (0, 1), value=num_tokens + spare)
    return ranks.all_tokens(model(tokens, positions, cu_seqlens, labels))[:num_tokens]


def _grouped(items: Iterable[Window], size: int) -> Iterator[list[Window]]:
    group: list[Window] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
