"""The parts of an evaluation: the same weights under each attention setting and at each context length. Results are plain values."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from configs.layers import LayerAttention
from configs.schema import ConfigError, EvaluateConfig, EvaluationPart, SuiteConfig
from data.shards import Corpus
from model.transformer import Transformer
from train.evaluate import AttentionSettings, Document, Scores, gain, reached_contexts, score
from train.gates import document_gates
from train.recall import Answer, answer
from train.report import describe_gain, describe_result
from train.retrieval import Sample, make_samples

if TYPE_CHECKING:
    from train.harness import Benchmarks

Values = dict[str, Any]
Progress = Callable[[str, int], None]
"""Called with what is being done and the number of tokens read since the last call."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """All that an evaluation needs but the weights, made before they are read, so that mistakes show first."""

    config: SuiteConfig
    settings: AttentionSettings
    contexts: tuple[int, ...]
    reached: tuple[int, ...]
    """Contexts of the parts that read documents, as `train.evaluate.reached_contexts` has them."""
    documents: list[Document]
    not_measured: tuple[str, ...]
    """What was asked for and these documents do not show, and why."""
    samples: list[Sample]
    benchmarks: "Benchmarks | None"

    @classmethod
    def prepare(
        cls, asked: EvaluateConfig, corpus: Corpus, settings: AttentionSettings, contexts: tuple[int, ...], documents: list[Document]
    ) -> "Suite":
        """Raises ConfigError for samples that do not fit, documents that are too short for all that is asked of them, benchmarks that are
        not there, gates where no layer has one."""
        config = asked.suite
        samples = make_samples(corpus, config, contexts) if EvaluationPart.RETRIEVAL in config.parts else []
        with_gates = any(_is_moba(layer) for layers in settings.values() for layer in layers)
        if EvaluationPart.GATES in config.parts and not with_gates:
            raise ConfigError(
                f"attentions={list(settings)}: no layer is MoBA, whose gates suite.parts asks for; add one such as moba(64, 4)"
            )
        reached = reached_contexts(asked, contexts, documents)
        not_measured = tuple(_not_measured(config, settings, contexts, reached, documents))
        if set(config.parts) == {EvaluationPart.GATES} and not any(has_choice for *_, has_choice in _gated(settings, reached)):
            raise ConfigError(f"suite.parts=gates: nothing to measure. {' '.join(not_measured)}")
        benchmarks = _open_benchmarks(config) if EvaluationPart.BENCHMARKS in config.parts else None
        return cls(
            config=config,
            settings=settings,
            contexts=contexts,
            reached=reached,
            documents=documents,
            not_measured=not_measured,
            samples=samples,
            benchmarks=benchmarks,
        )

    @property
    def scored_contexts(self) -> tuple[int, ...]:
        """Context lengths of the perplexity part: the one that gain is counted from comes first."""
        first = (self.config.gain_from,) if 0 < self.config.gain_from < max(self.reached, default=0) else ()
        return tuple(dict.fromkeys((*first, *self.reached)))

    @property
    def total_tokens(self) -> int:
        """What `run` reports to its progress."""
        scored = len(self.scored_contexts) * sum(len(document.tokens) - 1 for document in self.documents)
        read = sum(len(sample.prompt) for sample in self.samples)
        return len(self.settings) * (scored * (EvaluationPart.PERPLEXITY in self.config.parts) + read)

    def run(self, model: Transformer, corpus: Corpus, checkpoint: str, device: torch.device, progress: Progress) -> dict[str, list[Values]]:
        """What each part found, under its key of evaluation.json; a part that was not asked for has found nothing.

        Raises ConfigError where losses are not finite, the GPU's memory does not do, or benchmarks cannot be run.
        """
        found: dict[str, list[Values]] = {"results": [], "retrieval": [], "gates": [], "benchmarks": []}
        parts = self.config.parts
        for label, layers in self.settings.items():
            model.set_attention(layers)
            name = {"attention": label, "layers": [str(layer) for layer in layers]}
            if EvaluationPart.PERPLEXITY in parts:
                found["results"] += self._perplexity(name, model, checkpoint, device, progress)
            for context in dict.fromkeys((*self.contexts, *self.reached)):
                with _memory_suffices(context, label):
                    mine = [sample for sample in self.samples if sample.context == context]
                    found["retrieval"] += self._retrieval(
                        name, model, mine, corpus, partial(progress, f"{label}, retrieval at {context:,}")
                    )
                    if EvaluationPart.GATES in parts and context in self.reached:
                        found["gates"] += self._gates(name, model, layers, context, device)
            if self.benchmarks is not None:
                found["benchmarks"] += self._benchmarks(name, model, corpus, device)
        return found

    def _perplexity(self, name: Values, model: Transformer, checkpoint: str, device: torch.device, progress: Progress) -> Iterator[Values]:
        label, short = name["attention"], Scores()
        for context in self.scored_contexts:
            started = time.perf_counter()
            with _memory_suffices(context, label):
                advance = partial(progress, f"{label} at {context:,}")
                scores = score(model, self.documents, context=context, device=device, advance=advance)
            if not math.isfinite(scores.nats):
                raise ConfigError(f"checkpoint={checkpoint}: its losses are not finite under {label} at context {context}")
            result = describe_result(label, name["layers"], context, scores, time.perf_counter() - started)
            if context == self.config.gain_from:
                short = scores
            elif context > self.config.gain_from and short.tokens:
                result["gain"] = describe_gain(self.config.gain_from, gain(short, scores, context))
            yield result

    def _retrieval(
        self, name: Values, model: Transformer, samples: Sequence[Sample], corpus: Corpus, advance: Callable[[int], None]
    ) -> Iterator[Values]:
        answers: dict[tuple, list[Answer]] = {}
        for sample in samples:
            key = (sample.task.value, sample.context, sample.depth)
            answers.setdefault(key, []).append(answer(model, sample, corpus.tokenizer, write=self.config.generate))
            advance(len(sample.prompt))
        for (task, context, depth), of in answers.items():
            yield {
                **name,
                "task": task,
                "context": context,
                "depth": depth,
                "samples": len(of),
                "written": sum(each.written or 0.0 for each in of) / len(of) if self.config.generate else None,
                "ranked_first": sum(each.rank == 1 for each in of) / len(of),
                "mean_rank": sum(each.rank for each in of) / len(of),
                "candidates": 1 + self.config.distractors,
                "loss": sum(each.loss for each in of) / len(of),
            }

    def _gates(
        self, name: Values, model: Transformer, layers: Sequence[LayerAttention], context: int, device: torch.device
    ) -> Iterator[Values]:
        if any(map(_is_moba, layers)):
            texts = [document.tokens[:context] for document in self.documents[: self.config.gate_documents]]
            heads = document_gates(model, texts, num_queries=self.config.gate_queries, device=device)
            yield {**name, "context": context, "documents": len(texts), "heads": heads}

    def _benchmarks(self, name: Values, model: Transformer, corpus: Corpus, device: torch.device) -> Iterator[Values]:
        from train.harness import HarnessModel

        assert self.benchmarks is not None
        asked = HarnessModel(model, corpus.tokenizer, context=max(self.contexts), device=device)
        for row in self.benchmarks.run(asked):
            yield {**name, "context": max(self.contexts), **row, "cut_requests": asked.cut}


def _not_measured(
    config: SuiteConfig, settings: AttentionSettings, contexts: Sequence[int], reached: Sequence[int], documents: Sequence[Document]
) -> Iterator[str]:
    of_documents = [part.value for part in (EvaluationPart.PERPLEXITY, EvaluationPart.GATES) if part in config.parts]
    beyond = [f"{context:,}" for context in contexts if context not in reached]
    if of_documents and beyond:
        longest = max(len(document.tokens) for document in documents)
        yield f"{' and '.join(of_documents)} at a context of {', '.join(beyond)}: the longest scored document has {longest:,} tokens."
    if EvaluationPart.PERPLEXITY in config.parts and config.gain_from >= max(reached, default=0) > 0:
        yield f"gain from context: no context above {config.gain_from:,} is measured."
    if EvaluationPart.GATES in config.parts:
        for label, context, has_choice in _gated(settings, reached):
            if not has_choice:
                yield f"gates of {label} at a context of {context:,}: no query has more past blocks than it may choose."


def _gated(settings: AttentionSettings, contexts: Sequence[int]) -> list[tuple[str, int, bool]]:
    """Of the settings that have MoBA layers, at each of `contexts`: label, context, and whether a query of a document of that length has
    more past blocks than it chooses in some layer."""
    return [
        (label, context, any(_is_moba(layer) and 1 < layer.topk < -(-context // layer.block_size) for layer in layers))
        for label, layers in settings.items()
        if any(map(_is_moba, layers))
        for context in contexts
    ]


def _is_moba(layer: LayerAttention) -> bool:
    return layer.kind == "moba"


def _open_benchmarks(config: SuiteConfig) -> "Benchmarks":
    try:
        from train.harness import Benchmarks
    except ImportError as error:
        raise ConfigError(f"suite.parts=benchmarks: the package lm-eval is not installed ({error}); pip install lm-eval") from None
    return Benchmarks(config)


@contextmanager
def _memory_suffices(context: int, label: str) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise ConfigError(f"contexts={context}: is too long for this GPU's memory under {label}") from None
