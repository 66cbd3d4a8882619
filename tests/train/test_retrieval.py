"""Questions about long texts: what a prompt holds, how long it is, and that a reader who looks things up answers them."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from configs.layers import LayerAttention
from configs.registry import compose
from configs.schema import ConfigError, EvaluateConfig, RetrievalTask, RopeConfig, SuiteConfig
from data.shards import Corpus
from model.generate import Cursor
from model.init import initialise
from model.transformer import Transformer
from scripts.evaluate import evaluate
from tests.model.helpers import tiny_config
from tests.train.helpers import make_run
from train import recall
from train.loop import train
from train.recall import answer
from train.retrieval import Sample, make_samples

CONTEXTS = (768, 2048)


@pytest.fixture(scope="module")
def opened(corpus) -> Corpus:
    return Corpus.open(corpus)


@pytest.fixture(scope="module")
def samples(opened) -> list[Sample]:
    return make_samples(opened, SuiteConfig(samples=3, depths=(0.0, 0.5, 1.0)), CONTEXTS)


def of(samples: list[Sample], task: RetrievalTask) -> list[Sample]:
    return [sample for sample in samples if sample.task is task]


def texts(opened: Corpus, sample: Sample) -> tuple[str, list[str]]:
    """Prompt and candidates, decoded."""
    decode = opened.tokenizer.decode
    whole = decode(sample.prompt)
    return whole, [decode([*sample.prompt, *candidate])[len(whole) :] for candidate in sample.candidates]


def test_prompts_have_the_length_that_was_asked_for(opened, samples):
    assert Counter((sample.task, sample.context) for sample in samples) == {
        (task, context): 9 if task is RetrievalTask.NEEDLE else 3 for task in RetrievalTask for context in CONTEXTS
    }
    for sample in samples:
        assert sample.prompt[0] == opened.tokenizer.bos_id
        assert sample.room == max(map(len, sample.candidates)) + 8
        short = sample.context - len(sample.prompt) - sample.room
        assert 0 <= short < 9 if sample.task is RetrievalTask.COMMON_WORDS else short == 0
        assert len({tuple(candidate) for candidate in sample.candidates}) == 10
        _, (right, *_) = texts(opened, sample)
        assert all(expected in right for expected in sample.answers)


def test_samples_follow_the_seed_alone(opened, samples):
    again = make_samples(opened, SuiteConfig(samples=2, depths=(0.0,), tasks=(RetrievalTask.NEEDLE,)), CONTEXTS[1:])
    same = [sample for sample in of(samples, RetrievalTask.NEEDLE) if sample.context == CONTEXTS[1] and sample.depth == 0.0]
    assert all(np.array_equal(one.prompt, other.prompt) for one, other in zip(again, same[:2], strict=True))
    (other,) = make_samples(opened, SuiteConfig(samples=1, depths=(0.0,), tasks=(RetrievalTask.NEEDLE,), seed=1), CONTEXTS[1:])
    assert not np.array_equal(other.prompt, again[0].prompt)


@pytest.mark.parametrize("task", [RetrievalTask.NEEDLE, RetrievalTask.MULTI_KEY, RetrievalTask.MULTI_VALUE])
def test_codes_stand_in_held_out_text_at_their_depths(opened, samples, task):
    heldout = opened.split("heldout")
    known = "".join(opened.tokenizer.decode(heldout.tokens(number)) for number in range(heldout.num_documents))
    for sample in of(samples, task):
        prompt, _ = texts(opened, sample)
        asked = re.search(r"The codes? of (\S+) (?:is|are)$", prompt)[1]
        codes = re.findall(r"\nThe code of (\S+) is (\d{7})\.\n", prompt)
        assert len(codes) == {"needle": 1, "multi_key": 4, "multi_value": 4}[task.value]
        assert [code for name, code in codes if name == asked] == list(sample.answers)
        if sample.depth is not None:
            assert prompt.index("\nThe code") / len(prompt) == pytest.approx(sample.depth, abs=0.2)
        hay = re.split("\0|\n\n", re.sub(r"\nThe code of \S+ is \d{7}\.\n", "\0", prompt))[1:-1]
        assert len(hay) > 1 and [part for part in hay if part.strip("\n") not in known] == []


def test_names_stand_for_a_value_through_all_that_stand_for_each_other(opened, samples):
    for sample in of(samples, RetrievalTask.VARIABLE_TRACKING):
        prompt, candidates = texts(opened, sample)
        value = re.search(r"stand for (\d{7}) are$", prompt)[1]
        meanings = dict(re.findall(r"\nLet ([A-Z]{4}) be (\w+)\.\n", prompt))
        assert len(meanings) == 10

        def resolved(name: str, meanings: dict[str, str] = meanings) -> str:
            return resolved(meanings[name]) if name in meanings else name

        right = {name for name in meanings if resolved(name) == value}
        assert set(sample.answers) == right and len(right) == 5
        for wrong in candidates[1:]:
            assert set(re.findall("[A-Z]{4}", wrong)) != right


def test_the_words_asked_for_are_the_frequent_ones(opened, samples):
    for sample in of(samples, RetrievalTask.COMMON_WORDS):
        prompt, candidates = texts(opened, sample)
        counts = Counter(prompt.split("\n\n")[1].split())
        top = counts.most_common(6)
        assert {word for word, _ in top[:5]} == set(sample.answers)
        assert {count for _, count in top[:5]} == {10 * top[5][1]}
        assert all(set(wrong.strip().split(", ")) <= counts.keys() for wrong in candidates)
    for sample in of(samples, RetrievalTask.FREQUENT_WORDS):
        prompt, _ = texts(opened, sample)
        top = Counter(re.findall(r" \[([a-z]{6})\]", prompt)).most_common(4)
        assert [word for word, _ in top[:3]] == list(sample.answers) and top[2][1] > top[3][1]


def test_what_does_not_fit_is_refused(opened):
    for task in RetrievalTask:
        with pytest.raises(
            ConfigError, match=rf"contexts=64: is too short for {task.value}, whose prompt and answer have (\d+) tokens"
        ) as said:
            make_samples(opened, SuiteConfig(tasks=(task,)), (64,))
        needed = int(re.search(r"have (\d+) tokens", str(said.value))[1])
        assert 64 < needed < 700
    with pytest.raises(ConfigError, match=r"contexts=1048576: the held-out documents of data.prepared_dir=\S+ have \d+ tokens of text"):
        make_samples(opened, SuiteConfig(tasks=(RetrievalTask.NEEDLE,)), (1 << 20,))


# --- answers ---------------------------------------------------------------------------------------------------------------------------


class Copyist:
    """In the place of a cursor: what comes next is what came next where the longest stretch before it stood earlier."""

    def __init__(self, model, capacity: int) -> None:
        self.seen: list[int] = []
        self.capacity = capacity

    def advance(self, tokens):
        self.seen += tokens.tolist()
        assert len(self.seen) <= self.capacity
        ends = [end for end in range(1, len(self.seen)) if self.seen[end - 1] == self.seen[-1]] or [1]
        best = max(ends, key=lambda end: (self._common(end), end))
        logits = torch.zeros(1 << 10)
        logits[self.seen[best]] = 9.0
        return logits

    def _common(self, end: int) -> int:
        length = 0
        while length < min(end, 40) and self.seen[end - 1 - length] == self.seen[-1 - length]:
            length += 1
        return length

    def mark(self):
        return len(self.seen)

    def rewind(self, mark: int) -> None:
        del self.seen[mark:]


def test_who_copies_answers_needles(opened, monkeypatch):
    tasks = (RetrievalTask.NEEDLE, RetrievalTask.MULTI_KEY)
    found = make_samples(opened, SuiteConfig(samples=2, depths=(0.2, 0.9), tasks=tasks), (768,))
    monkeypatch.setattr(recall, "Cursor", Copyist)
    answers = [answer(None, sample, opened.tokenizer, write=True) for sample in found]
    assert [(each.written, each.rank) for each in answers] == [(1.0, 1)] * 6
    monkeypatch.setattr(Copyist, "advance", lambda self, tokens: torch.zeros(1 << 10))
    clueless = [answer(None, sample, opened.tokenizer, write=True) for sample in found]
    assert {(each.written, each.rank) for each in clueless} == {(0.0, 10)}  # to be as likely as the wrong ones is not to be found


@pytest.mark.parametrize("rule", ["full", "moba", "sliding"])
def test_candidates_are_scored_as_without_a_cache(opened, rule):
    attention = {"full": {}, "moba": {"block_size": 32, "topk": 3}, "sliding": {"window": 40}}[rule]
    config = tiny_config(vocab_size=512, max_seq_len=1024, key_conv=3, init_std=0.1)
    model = Transformer(config, (LayerAttention(kind=rule, **attention),) * 2, RopeConfig()).double()
    initialise(model, config, seed=3)
    (sample,) = make_samples(opened, SuiteConfig(samples=1, tasks=(RetrievalTask.MULTI_KEY,)), (512,))
    losses = []
    for candidate in sample.candidates:
        tokens = torch.tensor([*sample.prompt.tolist(), *candidate])
        with torch.no_grad():
            logits = model(tokens[:-1], torch.arange(len(tokens) - 1), torch.tensor([0, len(tokens) - 1], dtype=torch.int32))
        scores = logits[-len(candidate) :].log_softmax(-1)
        losses.append(-float(scores.gather(1, tokens[-len(candidate) :, None]).mean()))
    found = answer(model, sample, opened.tokenizer, write=False)
    assert found.written is None and found.loss == pytest.approx(losses[0], abs=1e-6)
    assert found.rank == 1 + sum(loss <= losses[0] for loss in losses[1:])


def test_answers_are_written_through_the_cache(opened):
    config = tiny_config(vocab_size=512, max_seq_len=1024)
    model = Transformer(config, (LayerAttention(kind="full"),) * 2, RopeConfig())
    initialise(model, config, seed=3)
    (sample,) = make_samples(opened, SuiteConfig(samples=1, tasks=(RetrievalTask.NEEDLE,), depths=(0.5,)), (512,))
    cursor = Cursor(model, capacity=sample.context)
    assert answer(model, sample, opened.tokenizer, write=True).written == 0.0 and cursor.length == 0


# --- the suite -----------------------------------------------------------------------------------------------------------------------


def test_a_long_suite_reports_every_part_for_every_attention_and_context(corpus, ranks, tmp_path):
    train(make_run(corpus, tmp_path / "run", "max_steps=1"), ranks)
    more = [
        f"checkpoint={tmp_path}/run",
        f"data.prepared_dir={corpus}",
        "device=cpu",
        "max_documents=3",
        "suite=long",
        "suite.gain_from=32",
        "suite.samples=1",
        "suite.depths=[0,1]",
        "suite.tasks=[needle,multi_key]",
    ]
    more += ["contexts=[256]", 'attentions=["full","last 1 full, rest moba(16, 2)"]']
    config = compose(EvaluateConfig, config_name="evaluate", overrides=more)
    report = evaluate(config)
    assert sorted(path.name for path in (tmp_path / "run" / "evaluation").iterdir()) == [
        *("evaluation.json", "evaluation.md", "gates.png", "needle.png", "position.png")
    ]
    settings = ["full", "last 1 full, rest moba(16, 2)"]
    assert [(r["attention"], r["context"]) for r in report["results"]] == [(a, c) for a in settings for c in (32, 256)]
    for short, long in (report["results"][:2], report["results"][2:]):
        assert "gain" not in short
        assert long["gain"]["gain"] == long["gain"]["loss_from"] - long["gain"]["loss"]
    assert [(r["attention"], r["task"], r["depth"]) for r in report["retrieval"]] == [
        (a, *rest) for a in settings for rest in (("needle", 0.0), ("needle", 1.0), ("multi_key", None))
    ]
    for row in report["retrieval"]:
        assert 0 <= row["written"] <= 1 and 1 <= row["mean_rank"] <= 10 and row["ranked_first"] == (row["mean_rank"] == 1)
    (gates,) = report["gates"]
    assert [len(gates["heads"]["mass"][0]), gates["heads"]["mass"][1], gates["context"]] == [4, None, 256]
    text = (tmp_path / "run" / "evaluation" / "evaluation.md").read_text()
    for words in ["Retrieval from long text", "needle.png", "gates.png", "What the gates choose", "| multi_key |", "predicted recall"]:
        assert words in text
    with pytest.raises(ConfigError, match=r"contexts=64: is too short for needle, .*leave needle out of suite.tasks"):
        evaluate(compose(EvaluateConfig, config_name="evaluate", overrides=[*more, "contexts=[64]"]))
    again = evaluate(config)
    assert [again[part] for part in ("retrieval", "gates")] == [report[part] for part in ("retrieval", "gates")]
