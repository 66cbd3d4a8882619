"""Standard benchmarks through EleutherAI's lm-eval, an optional package: our model behind its interface.

What it asks for is packed as documents of one forward pass, each behind the bos, as the model has been trained.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from configs.schema import ConfigError, SuiteConfig
from data.tokenizer import Tokenizer
from model.generate import generate
from model.transformer import Transformer
from train.evaluate import PASS_TOKENS, document_losses

_NEW_TOKENS = 256  # written at most, where a task says nothing


class HarnessModel(TemplateLM):
    """A model that reads at most `context` tokens; what is longer loses its beginning, and is counted in `cut`."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, context: int, device: torch.device) -> None:
        super().__init__()
        self.cut = 0
        self._model, self._own_tokenizer, self._context, self._on = model, tokenizer, context, device

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self._own_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that begins a document: what an empty context stands for."""
        return self._own_tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of the text alone: where a document begins, we add the bos ourselves."""
        return self._own_tokenizer.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)  # what an empty continuation has
        for group in _groups(rows):
            fed = [rows[index][0][:-1] for index in group]
            bounds = np.cumsum([0, *map(len, fed)])
            ids, positions = (
                torch.tensor(np.concatenate(part), device=self._on) for part in (fed, [np.arange(len(tokens)) for tokens in fed])
            )
            hidden = self._model.hidden(ids, positions, torch.from_numpy(bounds.astype(np.int32)))
            for index, (_, end) in zip(group, pairwise(bounds.tolist())):
                tokens, answered = rows[index]
                logits = self._model.head(hidden[end - answered : end]).float()
                targets = torch.tensor(tokens[-answered:], device=self._on)
                nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                found[index] = (-float(nats), bool((logits.argmax(dim=-1) == targets).all()))
        return found

    def _row(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """Ids of a document, its beginning cut where it is too long, and how many of the last are the answer."""
        begun = context if context[:1] == [self.prefix_token_id] else [self.prefix_token_id, *context]
        if len(continuation) > self._context:
            raise ConfigError(f"contexts={self._context}: is too short for a benchmark's answer of {len(continuation)} tokens")
        return self._fitting([*begun, *continuation], self._context + 1), len(continuation)  # the last token is predicted, not read

    def _fitting(self, tokens: list[int], limit: int) -> list[int]:
        self.cut += len(tokens) > limit
        return tokens[-limit:]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in the windows of `train.evaluate.windows`."""
        texts = [request.args[0] for request in requests]
        rows = (np.array([self.prefix_token_id, *self.tok_encode(text)]) for text in texts)
        return [-float(document_losses(self._model, row, context=self._context, device=self._on).sum()) for row in rows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the texts that shall end them."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        given = options.get("until") or []
        until = [text for text in ([given] if isinstance(given, str) else given) if text]
        count = int(options.get("max_gen_toks", _NEW_TOKENS))
        if count >= self._context:
            raise ConfigError(f"contexts={self._context}: is too short for a benchmark that lets {count} tokens be written")
        prompt = self._fitting([self.prefix_token_id, *self.tok_encode(context)], self._context - count)
        decode = self._own_tokenizer.decode
        written = generate(
            self._model,
            torch.tensor(prompt),
            max_new_tokens=count,
            temperature=float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            eos_id=self.eot_token_id,
            stop=lambda ids: any(text in decode(ids) for text in until),
        )
        text = decode(written.tolist())
        return text[: min((text.index(end) for end in until if end in text), default=len(text))]


def _groups(rows: Sequence[tuple[list[int], int]]) -> Iterator[list[int]]:
    """Indices of the rows that have an answer, longest first, together as many as a forward pass takes."""
    group: list[int] = []
    tokens = 0
    for index in sorted((index for index, (_, answered) in enumerate(rows) if answered), key=lambda index: -len(rows[index][0])):
        if group and tokens + len(rows[index][0]) > PASS_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += len(rows[index][0])
    if group:
        yield group


class Benchmarks:
    """The tasks that a suite names, found before anything is computed. Raises ConfigError for one that lm-eval does not have."""

    def __init__(self, suite: SuiteConfig) -> None:
        if suite.benchmark_dir and not Path(suite.benchmark_dir).is_dir():
            raise ConfigError(f"suite.benchmark_dir={suite.benchmark_dir}: no such folder")
        self._suite = suite
        self._manager = TaskManager(include_path=suite.benchmark_dir or None)
        for name in suite.benchmarks:
            if not self._manager.match_tasks([name]):
                raise ConfigError(f"suite.benchmarks={name}: lm-eval has no such task, nor has suite.benchmark_dir={suite.benchmark_dir!r}")

    def run(self, model: HarnessModel) -> list[dict[str, Any]]:
        """A row for each task and metric: value, standard error (None where there is none) and number of questions."""
        suite = self._suite
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(suite.benchmarks),
                num_fewshot=None if suite.benchmark_shots < 0 else suite.benchmark_shots,
                limit=suite.benchmark_limit or None,
                task_manager=self._manager,
                log_samples=False,
                random_seed=suite.seed,
                numpy_random_seed=suite.seed,
                torch_random_seed=suite.seed,
                fewshot_random_seed=suite.seed,
            )
        except (OSError, ValueError) as error:  # data that is neither local nor in the hub's cache
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"suite.benchmarks={list(suite.benchmarks)}: lm-eval cannot run them ({error})") from None
        return [row for task, values in found["results"].items() for row in _rows(task, values, found["n-samples"])]


def _rows(task: str, values: dict[str, Any], counts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if isinstance(value, (int, float)) and filtered and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            questions = counts.get(task, {}).get("effective")
            yield {
                "task": task,
                "metric": name,
                "value": float(value),
                "standard_error": error if isinstance(error, float) else None,
                "questions": questions,
            }
