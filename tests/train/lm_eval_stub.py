"""What train.harness takes from lm-eval, for machines without that optional package: the interface, and how it asks for log-probabilities.

test_harness.py holds it to the real package where that is installed.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest


@dataclass
class Instance:
    request_type: str
    doc: dict
    arguments: tuple
    idx: int

    @property
    def args(self) -> tuple:
        return self.arguments


class TemplateLM(ABC):
    @property
    @abstractmethod
    def eot_token_id(self) -> int: ...

    @abstractmethod
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]: ...

    @abstractmethod
    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]: ...

    @abstractmethod
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]: ...

    @abstractmethod
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]: ...

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Pairs of texts as pairs of ids: a context's last spaces belong to what follows; an empty one is the prefix."""
        asked = []
        for context, continuation in (request.args for request in requests):
            if not context:
                ids = [self.prefix_token_id], self.tok_encode(continuation)
            else:
                kept = context.rstrip()
                whole, count = self.tok_encode(context + continuation), len(self.tok_encode(kept))
                ids = whole[:count], whole[count:]
            asked.append(((context, continuation), *ids))
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)


@contextmanager
def installed() -> Iterator[None]:
    """Inside it, lm-eval can be imported, and does no more than this."""
    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.instance", "lm_eval.api.model", "lm_eval.tasks")}
    modules["lm_eval.api.instance"].Instance = Instance
    modules["lm_eval.api.model"].TemplateLM = TemplateLM
    modules["lm_eval"].simple_evaluate = modules["lm_eval.tasks"].TaskManager = _absent
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def _absent(*arguments: Any, **options: Any) -> None:
    raise AssertionError("tasks need lm-eval itself")
