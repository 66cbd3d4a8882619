"""Our model behind lm-eval's interface; on a local task where that optional package is installed."""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import sys

import numpy as np
import pytest
import torch

from configs.layers import LayerAttention
from configs.schema import ConfigError, EvaluationPart, RopeConfig, SuiteConfig
from data.shards import Corpus
from model.init import initialise
from model.transformer import Transformer
from tests.model.helpers import tiny_config
from tests.train import lm_eval_stub

IS_INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not IS_INSTALLED, reason="lm-eval is optional")

MOBA = LayerAttention(kind="moba", block_size=8, topk=2)
REQUESTS = [
    ("The state of the", " Union"),
    ("", "My fellow citizens"),
    ("A space ", "and more"),
    ("def f(x):\n", "    return x"),
    ("x" * 300, "y"),
]


@pytest.fixture(scope="module")
def harness():
    """The module, on lm-eval or on what stands for it."""
    with contextlib.nullcontext() if IS_INSTALLED else lm_eval_stub.installed():
        yield importlib.import_module("train.harness")
    sys.modules.pop("train.harness")


@pytest.fixture(scope="module")
def asked(corpus, harness):
    config = tiny_config(vocab_size=512)
    model = Transformer(config, (MOBA,) * 2, RopeConfig())
    initialise(model, config, seed=2)
    return harness.HarnessModel(model.eval(), Corpus.open(corpus).tokenizer, context=64, device=torch.device("cpu"))


def instances(kind: str, arguments: list[tuple]) -> list:
    return [
        sys.modules["lm_eval.api.instance"].Instance(request_type=kind, doc={}, arguments=each, idx=number)
        for number, each in enumerate(arguments)
    ]


@torch.no_grad()
def logits_of(asked, tokens: list[int]) -> torch.Tensor:
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    return asked._model(torch.tensor(tokens), torch.arange(len(tokens)), bounds).double().log_softmax(-1)


def test_answers_have_the_log_probability_of_one_pass_each(asked, harness, monkeypatch):
    monkeypatch.setattr(harness, "PASS_TOKENS", 60)  # the short ones share a pass
    before, encode = asked.cut, asked.tok_encode
    found = asked.loglikelihood(instances("loglikelihood", REQUESTS), disable_tqdm=True)
    for (context, continuation), (log_probability, is_greedy) in zip(REQUESTS, found, strict=True):
        tokens = [asked.prefix_token_id, *encode(context + continuation)][-65:]
        count = len(encode(context + continuation)) - len(encode(context.rstrip()))
        scores = logits_of(asked, tokens[:-1])[-count:]
        targets = torch.tensor(tokens[-count:])
        assert log_probability == pytest.approx(float(scores.gather(1, targets[:, None]).sum()), abs=1e-3)
        assert is_greedy == bool((scores.argmax(-1) == targets).all())
    assert asked.cut == before + 1  # and it is the long one


def test_a_whole_text_is_scored_once_a_token(asked):
    text = "It is my duty to report. " * 3
    (found,) = asked.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    tokens = [asked.prefix_token_id, *asked.tok_encode(text)]
    assert len(tokens) <= 64
    scores = logits_of(asked, tokens[:-1]).gather(1, torch.tensor(tokens[1:])[:, None])
    assert found == pytest.approx(float(scores.sum()), abs=1e-3)


def test_writing_ends_before_the_text_that_ends_it(asked):
    options = {"max_gen_toks": 20, "until": []}
    (whole,) = asked.generate_until(instances("generate_until", [("My fellow", options)]))
    end = whole[len(whole) // 2 : len(whole) // 2 + 2]
    (cut,) = asked.generate_until(instances("generate_until", [("My fellow", options | {"until": [end, "\0"]})]))
    assert cut == whole[: whole.index(end)]
    with pytest.raises(ConfigError, match="contexts=64: is too short for a benchmark that lets 64 tokens be written"):
        asked.generate_until(instances("generate_until", [("a", {"max_gen_toks": 64})]))


@needs_lm_eval
def test_a_local_task_runs_offline(asked, harness, tmp_path):
    rows = [{"question": f"{n} and {n} is", "choices": [f" {2 * n}", f" {3 * n}"], "answer": n % 2} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        f"task: own_sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    suite = SuiteConfig(parts=(EvaluationPart.BENCHMARKS,), benchmarks=("own_sums",), benchmark_dir=str(tmp_path))
    (row,) = harness.Benchmarks(suite).run(asked)
    right = []
    for each in rows:
        pair = [(each["question"], f" {choice}") for choice in each["choices"]]  # lm-eval puts a space between them
        scores = [score for score, _ in asked.loglikelihood(instances("loglikelihood", pair), disable_tqdm=True)]
        right.append(int(np.argmax(scores)) == each["answer"])
    assert (row["task"], row["metric"], row["questions"]) == ("own_sums", "acc", 8)
    assert row["value"] == pytest.approx(np.mean(right))
    assert row["standard_error"] == pytest.approx(math.sqrt(np.var(right) / 7), abs=1e-6)


@needs_lm_eval
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ("no_such_task",)}, "suite.benchmarks=no_such_task: lm-eval has no such task"),
        ({"benchmarks": ("hellaswag",), "benchmark_dir": "none"}, "suite.benchmark_dir=none: no such folder"),
    ],
)
def test_what_lm_eval_does_not_have_is_refused(harness, changes, message):
    with pytest.raises(ConfigError, match=message):
        harness.Benchmarks(SuiteConfig(parts=(EvaluationPart.BENCHMARKS,), **changes))


@needs_lm_eval
def test_what_stands_for_lm_eval_has_its_interface(harness):
    """The same methods to write with the same parameters, instances made of the same values, and the same requests of the same pairs."""
    model, instance = sys.modules["lm_eval.api.model"].TemplateLM, sys.modules["lm_eval.api.instance"].Instance
    assert _to_write(model) == _to_write(lm_eval_stub.TemplateLM)
    required = [name for name, each in inspect.signature(instance).parameters.items() if each.default is each.empty]
    assert required == [each.name for each in dataclasses.fields(lm_eval_stub.Instance)]
    made, ours = (kind(request_type="loglikelihood", doc={}, arguments=("a", "b"), idx=0) for kind in (instance, lm_eval_stub.Instance))
    assert made.args == ours.args
    requests = []
    for base in (model, lm_eval_stub.TemplateLM):
        asking = type("Asking", (base,), dict.fromkeys(model.__abstractmethods__))
        asking.prefix_token_id, asking.eot_token_id = 1, 2
        asking.tok_encode = lambda self, text, add_special_tokens=None, **more: list(text.encode())
        asking._loglikelihood_tokens = lambda self, asked, **more: asked
        pairs = [lm_eval_stub.Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in REQUESTS]
        requests.append([(list(context), list(answer)) for _, context, answer in asking().loglikelihood(pairs)])
    assert requests[0] == requests[1]


def _to_write(model: type) -> dict[str, list[str]]:
    """The parameters of each abstract method, none of a property."""
    members = {name: getattr(model, name) for name in model.__abstractmethods__}
    return {name: [] if isinstance(each, property) else list(inspect.signature(each).parameters) for name, each in members.items()}
