"""Evaluation of a checkpoint on held-out documents: what is scored, in which window, how it is added up and written down."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.layers import LayerAttention
from configs.registry import REPOSITORY, compose
from configs.schema import (
    ConfigError,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    RunConfig,
    SourceConfig,
    SourceFormat,
    StageConfig,
    StretchConfig,
    TokenizerConfig,
    TokenizerKind,
)
from data.prepare import prepare
from data.shards import Corpus
from data.tokenizer import train_tokenizer
from model.init import initialise
from model.transformer import Transformer
from scripts import evaluate as door
from scripts.evaluate import evaluate
from scripts.figures import plot_losses, plot_positions, read_metrics, short_count
from tests.data.conftest import make_texts, write_jsonl
from tests.train.helpers import execute, overrides, start_ranks
from train.distributed import Ranks
from train.evaluate import Scores, choose_documents, document_losses, gain, stretch, windows
from train.fragments import FragmentFolder
from train.report import overview

CPU = torch.device("cpu")
QUICK = settings(max_examples=200, deadline=None)
STAGES = (0, 1, 2, 3)
LINEAR = RopeConfig(scaling=RopeScaling.LINEAR, factor=2.0)
FULL, MOBA = LayerAttention(kind="full"), LayerAttention(kind="moba", block_size=4, topk=2)


# Windows


@QUICK
@given(num_tokens=st.integers(2, 400), context=st.integers(1, 500))
def test_each_token_but_the_first_is_scored_once_with_half_a_context_before_it(num_tokens, context):
    scored = []
    for window in windows(num_tokens, context):
        assert 0 <= window.start < window.stop <= window.start + context
        assert window.start < window.first <= window.stop < num_tokens
        for token in range(window.first, window.stop + 1):
            seen = token - window.start
            assert seen == token or seen > context / 2
            scored.append(token)
    assert scored == list(range(1, num_tokens))


def make_model(attention: LayerAttention) -> Transformer:
    """Two layers of random weights, large enough for attention to decide the losses; 64 words."""
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48, max_seq_len=64, init_std=0.3
    )
    model = Transformer(config, (attention,) * 2, RopeConfig())
    initialise(model, config, seed=1)
    return model.eval()


def random_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 64, count).astype(np.uint16)


@torch.no_grad()
def naive_losses(model: Transformer, tokens: np.ndarray, context: int) -> list[float]:
    """One forward pass a token: the window that scores it by definition, cut before the token itself."""
    step = max(1, context // 2)
    losses = []
    for token in range(1, len(tokens)):
        start = step * max(0, math.ceil((token - context) / step))
        seen = torch.from_numpy(tokens[start:token].astype(np.int64))
        logits = model(seen, torch.arange(len(seen)), torch.tensor([0, len(seen)], dtype=torch.int32))
        losses.append(-float(logits[-1].double().log_softmax(-1)[int(tokens[token])]))
    return losses


@pytest.mark.parametrize("attention", [FULL, MOBA], ids=str)
@pytest.mark.parametrize("context", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("num_tokens", [2, 3, 45])
def test_losses_are_those_of_one_pass_a_token(attention, context, num_tokens):
    model, tokens = make_model(attention), random_tokens(num_tokens)
    np.testing.assert_allclose(document_losses(model, tokens, context=context, device=CPU), naive_losses(model, tokens, context), atol=2e-5)


@pytest.mark.parametrize("attention", [FULL, MOBA], ids=str)
def test_windows_packed_together_score_as_they_do_alone(attention, monkeypatch):
    model, tokens = make_model(attention), random_tokens(150)
    heard = []
    together = document_losses(model, tokens, context=16, device=CPU, advance=heard.append)
    assert sum(heard) == 149
    monkeypatch.setattr("train.evaluate.PASS_TOKENS", 1)
    np.testing.assert_allclose(document_losses(model, tokens, context=16, device=CPU), together, atol=2e-5)


def test_moba_that_sees_every_block_is_full_attention():
    model, tokens = make_model(FULL), random_tokens(90)
    full = document_losses(model, tokens, context=32, device=CPU)
    model.set_attention((LayerAttention(kind="moba", block_size=8, topk=4),) * 2)
    assert np.array_equal(document_losses(model, tokens, context=32, device=CPU), full)
    model.set_attention((LayerAttention(kind="moba", block_size=8, topk=2),) * 2)
    assert np.abs(document_losses(model, tokens, context=32, device=CPU) - full).max() > 0.01


# Sums


@QUICK
@given(lengths=st.lists(st.integers(2, 300), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_buckets_hold_each_token_once(lengths, seed):
    rng = np.random.default_rng(seed)
    losses = [rng.random(length - 1) for length in lengths]
    scores = Scores()
    for values in losses:
        scores.add(values, text_bytes=3 * len(values))
    nats, tokens = sum(values.sum() for values in losses), sum(map(len, losses))
    assert (scores.tokens, scores.text_bytes) == (tokens, 3 * tokens)
    assert scores.loss == pytest.approx(nats / tokens)
    assert scores.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * tokens))
    assert scores.perplexity == pytest.approx(math.exp(nats / tokens))
    for buckets in (scores.by_position, scores.by_length):
        assert sum(bucket.tokens for bucket in buckets.values()) == tokens
        assert sum(bucket.nats for bucket in buckets.values()) == pytest.approx(nats)
    for low, bucket in scores.by_position.items():
        inside = [values[low - 1 : 2 * low - 1] for values in losses if len(values) >= low]
        assert (bucket.low, bucket.high, bucket.documents) == (low, 2 * low, len(inside))
        assert bucket.loss == pytest.approx(np.concatenate(inside).mean())
    for low, bucket in scores.by_length.items():
        assert bucket.documents == sum(low <= length < 2 * low for length in lengths)


# Documents


def make_corpus(folder: Path, *, vocab_size: int = 384, heldout_fraction: float = 0.2) -> Path:
    """Eighty short texts under a sentencepiece model of their own, the same for the same vocabulary."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train_tokenizer(make_texts(60, seed=9), vocab_size=vocab_size))
    config = DataConfig(
        prepared_dir=str(folder / "corpus"),
        sources=(SourceConfig(name="lines", format=SourceFormat.JSONL, path=str(write_jsonl(folder / "a.jsonl", make_texts(80)))),),
        tokenizer=TokenizerConfig(kind=TokenizerKind.SENTENCEPIECE, path=str(folder / "tokenizer.model")),
        heldout_fraction=heldout_fraction,
        num_workers=1,
    )
    prepare(config)
    return folder / "corpus"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("evaluate") / "texts")


def select(corpus: Path, **changes: Any) -> list:
    return choose_documents(Corpus.open(corpus), EvaluateConfig(checkpoint="none", data=DataConfig(prepared_dir=str(corpus)), **changes))


def test_the_longest_documents_are_chosen(corpus):
    lengths = Corpus.open(corpus).split("heldout").lengths
    everything = select(corpus, max_documents=0)
    assert [document.number for document in everything] == sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    assert [document.number for document in select(corpus, max_documents=3)] == [document.number for document in everything[:3]]
    middle = int(np.median(lengths))
    assert all(len(document.tokens) >= middle for document in select(corpus, max_documents=0, min_document_tokens=middle))


@pytest.mark.parametrize("limit", range(2, 60, 3))
def test_a_cut_document_counts_the_bytes_of_its_whole_characters(corpus, limit):
    opened = Corpus.open(corpus)
    for document in select(corpus, max_document_tokens=limit, max_documents=0):
        whole = opened.tokenizer.decode(opened.split("heldout").tokens(document.number)).encode()
        assert document.is_cut == (limit < opened.split("heldout").lengths[document.number])
        assert len(document.tokens) <= limit
        spelt = opened.tokenizer.decode(document.tokens).rstrip("\ufffd")
        assert whole[: document.text_bytes].decode() == spelt if document.is_cut else document.text_bytes == len(whole)


# A checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus) -> dict[int, Path]:
    """A run of two steps for each ZeRO stage, all in one process of their own."""
    root = tmp_path_factory.mktemp("runs")
    folders = {stage: root / f"zero{stage}" for stage in STAGES}
    more = ["stages.0.tokens=1024", "evaluation.rows=0", "optim.lr=0.01"]
    jobs = [{"overrides": overrides(corpus, folders[s], f"parallel=zero{s}", *more), "kill_in_step": None} for s in STAGES]
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "tests.train.driver", str(root / "jobs.json")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture(scope="module")
def asked(corpus, runs, tmp_path_factory) -> Callable[..., EvaluateConfig]:
    """An EvaluateConfig of the ZeRO-1 run; arguments are overrides as on the command line."""
    output = tmp_path_factory.mktemp("output")

    def make(*more: str) -> EvaluateConfig:
        places = [f"checkpoint={runs[1]}", f"data.prepared_dir={corpus}", f"output_dir={output}"]
        plain = ["contexts=[16,128]", "device=cpu", "max_documents=4"]
        return compose(EvaluateConfig, config_name="evaluate", overrides=[*places, *plain, *more])

    return make


def figures_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if "second" not in key} for result in report["results"]]


def test_the_report_is_complete_and_the_same_again(asked, tmp_path, corpus, runs):
    config = asked(f"output_dir={tmp_path}/new/folder", 'attentions=["full","moba","moba(32, 2)","last 1 full, rest moba(8, 2)"]')
    report = evaluate(config)
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "evaluation.md", "position.png"]
    assert json.loads((folder / "evaluation.json").read_text()) == report
    assert (folder / "position.png").read_bytes().startswith(b"\x89PNG")

    settings = ["full", "moba(32, 2)", "last 1 full, rest moba(8, 2)"]  # a bare moba is the trained moba(32, 2), once
    assert [(r["attention"], r["context"]) for r in report["results"]] == [(a, c) for a in settings for c in (16, 128)]
    assert report["results"][-1]["layers"] == ["moba(8, 2)", "full"]
    assert (report["step"], report["trained_context"], report["trained_attention"]) == (2, 128, "moba(32, 2)")
    assert report["checkpoint"] == str(runs[1] / "checkpoints" / "step_00000002")
    assert report["launch"]["packages"]["torch"] and report["training"]["config"]["seed"] == 0
    tokens = sum(sorted(Corpus.open(corpus).split("heldout").lengths)[-4:]) - 4
    for result in report["results"]:
        assert result["tokens"] == tokens == report["documents"]["scored_tokens"]
        assert 2 < result["loss"] < math.log(512) + 1
        assert sum(bucket["tokens"] for bucket in result["by_position"]) == tokens

    text = (folder / "evaluation.md").read_text()
    for words in [*settings, "bits per byte", "64 to 127", "position.png", "step 2", f"{report['results'][0]['loss']:.4f}"]:
        assert words in text
    assert figures_of(evaluate(config)) == figures_of(report)


def test_every_zero_stage_loads_and_what_was_trained_is_the_default(asked, runs):
    found = {stage: evaluate(asked(f"checkpoint={runs[stage]}/checkpoints", "output_dir=''", "contexts=[]")) for stage in STAGES}
    for stage, report in found.items():
        assert report["output_dir"] == str(runs[stage] / "evaluation")
        assert [(result["attention"], result["context"]) for result in report["results"]] == [("moba(32, 2)", 128)]
        assert report["results"][0]["loss"] == pytest.approx(found[0]["results"][0]["loss"], abs=1e-3)
        assert report["results"][0]["loss"] < math.log(512) - 0.1  # trained weights, not fresh ones


def test_a_single_result_makes_a_whole_report(asked, tmp_path):
    report = evaluate(asked(f"output_dir={tmp_path}", "contexts=[]", "max_documents=1", "max_document_tokens=2"))
    assert [len(report["results"]), report["documents"]["scored_tokens"]] == [1, 1]  # one token of one document, by hand:
    (result,) = report["results"]
    bucket = {
        "documents": 1,
        "tokens": 1,
        "nats": result["nats"],
        "loss": result["nats"],
        "perplexity": pytest.approx(math.exp(result["nats"])),
    }
    assert result["by_position"] == [{"low": 1, "high": 2} | bucket] and result["by_length"] == [{"low": 2, "high": 4} | bucket]
    assert result["bits_per_byte"] is None or result["bits_per_byte"] == result["nats"] / math.log(2) / result["text_bytes"]
    text = (tmp_path / "evaluation.md").read_text()
    perplexity = f"{math.exp(result['nats']):,.2f}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert ["1 to 1", "1", "1", perplexity] in rows and ["2 to 3", "1", "1", perplexity] in rows
    assert sum(row[:2] == ["moba(32, 2)", "2"] for row in rows) == 1 and (tmp_path / "position.png").stat().st_size > 5000


def test_cut_documents_and_bf16(asked):
    report = evaluate(asked("precision=bf16", "max_document_tokens=50", "contexts=[16]"))
    whole = evaluate(asked("max_document_tokens=50", "contexts=[16]"))
    assert report["documents"]["cut"] == 4 and report["documents"]["scored_tokens"] == 4 * 49
    assert report["results"][0]["loss"] == pytest.approx(whole["results"][0]["loss"], abs=0.02)
    assert report["results"][0]["loss"] != whole["results"][0]["loss"]
    assert "scored up to there" in (Path(report["output_dir"]) / "evaluation.md").read_text()


def test_ranks_that_share_documents_report_as_one_does(asked, runs, corpus, tmp_path):
    keys = ["contexts=[50]", "max_documents=2", "device=cpu", 'attentions=["full","moba"]']
    arguments = [f"checkpoint={runs[3]}", f"data.prepared_dir={corpus}", f"output_dir={tmp_path}", *keys]
    done = start_ranks(["scripts.evaluate", *arguments], num_ranks=2)
    assert done.returncode == 0, done.stderr
    shared, alone = json.loads((tmp_path / "evaluation.json").read_text()), evaluate(asked(f"checkpoint={runs[3]}", *keys))
    assert shared["launch"]["world_size"] == 2 and done.stderr.count("| moba(32, 2) |") == 1
    for ours, theirs in zip(figures_of(shared), figures_of(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert [bucket["tokens"] for bucket in ours["by_position"]] == [bucket["tokens"] for bucket in theirs["by_position"]]


def test_ranks_that_cannot_share_documents_are_refused(asked, monkeypatch):
    monkeypatch.setattr(door, "on_main", lambda ranks, work: work())
    with pytest.raises(ConfigError, match=r"^checkpoint=.*: its model has 4 query heads, which the 3 ranks .* accepted: 1, 2, 4$"):
        evaluate(asked("output_dir=nowhere"), Ranks(rank=0, world_size=3, device=CPU))
    with pytest.raises(ConfigError, match=r"^suite.parts=retrieval,gates: .* 2 ranks .* perplexity alone"):
        evaluate(asked("output_dir=nowhere", "suite.parts=[perplexity,retrieval,gates]"), Ranks(rank=0, world_size=2, device=CPU))
    assert not Path("nowhere").exists()


def test_the_command_prints_the_table_and_the_files(asked, runs, corpus, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    arguments = [f"checkpoint={runs[1]}", f"data.prepared_dir={corpus}", "contexts=[16]", "max_documents=2", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    door.main()
    printed = capsys.readouterr().out
    assert "| moba(32, 2) |      16 |" in printed and f"{runs[1]}/evaluation/evaluation.md" in printed
    by_path = [sys.executable, str(REPOSITORY / "scripts" / "evaluate.py"), *arguments]
    done = execute(by_path, cwd=runs[1])
    assert done.returncode == 0 and done.stdout.splitlines()[-3:] == printed.splitlines()[-3:], done.stderr
    monkeypatch.setattr(sys, "argv", ["evaluate", "contexts=[16]"])
    with pytest.raises(SystemExit) as ended:
        door.main()
    assert ended.value.code == 2 and "checkpoint='': must be a run folder" in capsys.readouterr().err


# Suites


def test_stretched_positions_reach_further(asked, tmp_path):
    further = ["rope.scaling=yarn", "rope.factor=2", f"output_dir={tmp_path}", "max_documents=1"]
    report = evaluate(asked(*further, "contexts=[400]"))
    plain = evaluate(asked(f"output_dir={tmp_path}", "contexts=[400]", "max_documents=1"))
    assert report["results"][0]["loss"] != plain["results"][0]["loss"]
    assert "no scored document is that long" in refused(lambda: asked(*further, "contexts=[1024]"))  # 512 positions no longer are the limit
    with pytest.raises(ConfigError, match="scaling=linear, which alone can go on"):
        stretch(StageConfig(rope=LINEAR), RunConfig(), StretchConfig(scaling=RopeScaling.NTK, factor=2.0))
    further = stretch(StageConfig(rope=LINEAR), RunConfig(), StretchConfig(scaling=RopeScaling.LINEAR, factor=3.0))
    assert further.rope.factor == 6.0


def test_gain_is_of_the_same_tokens_with_documents_as_draws():
    rng = np.random.default_rng(0)
    short, long = Scores(), Scores()
    losses = [(rng.random(n), rng.random(n)) for n in (100, 60, 7)]
    for under_short, under_long in losses:
        short.add(under_short, 1)
        long.add(under_long, 1)
    found = gain(short, long, context=32)
    counted = [(a[15:], b[15:]) for a, b in losses[:2]]  # from token 16 on
    assert (found.documents, found.tokens) == (2, 85 + 45)
    assert found.short == pytest.approx(np.concatenate([a for a, _ in counted]).mean())
    difference = np.concatenate([a - b for a, b in counted]).mean()
    assert found.gain == pytest.approx(difference, abs=1e-6)
    clusters = [(a - b - difference).sum() for a, b in counted]
    assert found.standard_error == pytest.approx(math.sqrt(sum(c * c for c in clusters)) / 130, rel=1e-4)
    assert gain(short, long, context=300) is None


def test_what_documents_are_too_short_for_is_named_and_not_shown(asked, corpus, tmp_path):
    longest = Corpus.open(corpus).split("heldout").lengths.max()
    assert 128 < longest < 500
    rules = 'attentions=["moba(32, 2)","moba(8, 2)","full"]'
    plain = [f"output_dir={tmp_path}", "contexts=[16,64,500]", "max_documents=2", rules]
    report = evaluate(asked(*plain, "suite.parts=[perplexity,gates]", "suite.gain_from=64"))
    assert {row["context"] for part in ("results", "gates") for row in report[part]} == {16, 64}
    assert report["not_measured"] == [
        f"perplexity and gates at a context of 500: the longest scored document has {longest} tokens.",
        "gain from context: no context above 64 is measured.",
        "gates of moba(32, 2) at a context of 16: no query has more past blocks than it may choose.",
        "gates of moba(32, 2) at a context of 64: no query has more past blocks than it may choose.",
        "gates of moba(8, 2) at a context of 16: no query has more past blocks than it may choose.",
    ]
    assert [bool(row["heads"]) for row in report["gates"]] == [False, False, False, True] and (tmp_path / "gates.png").exists()
    for text in ((tmp_path / "evaluation.md").read_text(), overview(report)):
        assert all(f"- Not measured: {said}\n" in f"{text}\n" for said in report["not_measured"])
    measured = evaluate(asked(*plain, "contexts=[16,128]", "suite.gain_from=64"))
    assert measured["not_measured"] == [] and measured["results"][-1]["gain"]["tokens"] > 0


def test_a_trained_context_that_no_document_fills_is_taken_as_far_as_they_go(asked, tmp_path):
    report = evaluate(asked(f"output_dir={tmp_path}", "contexts=[]", "max_document_tokens=50"))
    assert [result["context"] for result in report["results"]] == [50]
    assert report["not_measured"] == ["perplexity at a context of 128: the longest scored document has 50 tokens."]


def test_benchmarks_without_their_package_are_one_line(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "train.harness", raising=False)
    message = refused(lambda: asked("suite=benchmarks"))
    assert message.startswith("suite.parts=benchmarks: the package lm-eval is not installed") and "pip install lm-eval" in message


# Mistakes


def refused(config: Callable[[], EvaluateConfig]) -> str:
    with pytest.raises(ConfigError) as refusal:
        evaluate(config())
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_mistakes_are_named_before_the_work(asked, tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(door, "load_into", lambda *arguments, **named: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    other = make_corpus(tmp_path / "other", vocab_size=400)
    no_heldout = make_corpus(tmp_path / "no_heldout", heldout_fraction=0.0)
    hashes = [Corpus.open(folder).tokenizer_hash for folder in (corpus, other)]
    longest = Corpus.open(corpus).split("heldout").lengths.max()
    mistakes = {
        f"checkpoint={tmp_path}/none": [f"checkpoint={tmp_path}/none: no such checkpoint or run folder"],
        "contexts=[16,1030]": ["contexts=1030", "model.max_seq_len=512", "rope.scaling=yarn rope.factor=3 would allow it"],
        "contexts=[500,510]": ["contexts=500,510: no scored document is that long", f"the longest has {longest} tokens"],
        "max_document_tokens=10": ["contexts=16,128", "the longest has 10 tokens", "max_document_tokens"],
        "rope.factor=2": ["rope.factor=2.0", "needs a scaling: linear, ntk, yarn or llama3"],
        "rope.scaling=ntk": ["rope.factor=1.0", "greater than 1"],
        "suite=long": ["suite.gain_from=1024", "below one of contexts=[16, 128]"],
        "suite.parts=[retrieval]": ["held-out documents have 18 words; retrieval needs more"],
        "suite.tasks=[]": ["suite.tasks", "must hold at least one"],
        "suite.depths=[0.5,2]": ["suite.depths=2", "between 0 and 1"],
        "suite.distractors=21": ["suite.distractors=21", "at most 20"],
        "suite.parts=[benchmarks]": ["suite.benchmarks", "must name tasks of lm-eval"],
        "contexts=[0]": ["contexts=0", "at least 1"],
        f"data.prepared_dir={other}": [str(other), *hashes],
        f"data.prepared_dir={no_heldout}": [f"data.prepared_dir={no_heldout}: has no held-out documents"],
        f"data.prepared_dir={tmp_path}/none": ["no prepared corpus there"],
        "min_document_tokens=100000": ["min_document_tokens=100000", f"longest has {longest} tokens"],
        "max_document_tokens=1": ["max_document_tokens=1", "at least 2"],
        'attentions=["full","mobba"]': ["attentions.1", "'mobba'", "accepted: full, moba, moba(BLOCK_SIZE, TOPK)"],
        'attentions=["last 1 full"]': ["attentions.0", "layers [0] of 2"],
        f"output_dir={tmp_path}/file": [f"output_dir={tmp_path}/file: is a file"],
        f"output_dir={tmp_path}/file/below": [f"output_dir={tmp_path}/file/below: cannot be made"],
    }
    assert "no layer is MoBA" in refused(lambda: asked("suite.parts=[gates]", "attentions=[full]"))
    nothing = refused(lambda: asked("suite.parts=[gates]", "attentions=[moba]", "contexts=[64]"))
    assert nothing.startswith("suite.parts=gates: nothing to measure. gates of moba(32, 2) at a context of 64: no query has more past")
    for override, wanted in mistakes.items():
        message = refused(lambda override=override: asked(override))
        assert all(words in message for words in wanted), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "no_heldout", "other"]


def test_a_damaged_checkpoint_is_refused_by_name(asked, runs, tmp_path):
    copy = tmp_path / "step_00000002"
    shutil.copytree(runs[1] / "checkpoints" / "step_00000002", copy)
    assert "lies in no run folder" in refused(lambda: asked(f"checkpoint={copy}", "output_dir=''"))
    with (copy / "state.json").open("a") as file:
        file.write(" ")
    message = refused(lambda: asked(f"checkpoint={copy}"))
    assert message.startswith(f"checkpoint={copy}: is damaged: state.json has")


def test_losses_that_are_not_finite_and_a_full_disk_leave_nothing(asked, tmp_path, monkeypatch):
    config = asked(f"output_dir={tmp_path}", "contexts=[16]", "max_documents=1")
    plain = FragmentFolder.weight
    with monkeypatch.context() as patched:
        patched.setattr(FragmentFolder, "weight", lambda self, name: plain(self, name) * math.nan)
        assert "losses are not finite under moba(32, 2) at context 16" in refused(lambda: config)

    def full_disk(path: Path, text: str) -> None:
        path.with_name(f".{path.name}.partial").write_text(text[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(door, "write_atomically", full_disk)
    assert "could not be written (No space left on device)" in refused(lambda: config)
    assert [path.name for path in tmp_path.iterdir()] == ["position.png"]  # whole; evaluation.json would say that all is there


# Figures


def test_figures_take_single_points_infinite_values_and_cut_files(tmp_path):
    bucket = {"low": 1, "high": 2, "perplexity": 9.0}
    plot_positions(tmp_path / "a.png", {"one": [bucket], "none": [bucket | {"perplexity": None}]})
    plot_positions(tmp_path / "b.png", {f"{n}": [bucket | {"low": 1 << i, "high": 2 << i} for i in range(6)] for n in range(9)})
    lines = [
        {"step": 1, "loss": 3.0, "tokens": 512},
        {"event": "evaluation", "step": 1, "heldout_loss": 3.1},
        {"step": 2, "loss": None, "tokens": 1024},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n12\n[]\n{"step": 3, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
    (tmp_path / "empty.jsonl").write_text("")
    plot_losses(tmp_path / "c.png", {"run": tmp_path / "metrics.jsonl", "begun": tmp_path / "empty.jsonl"})
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in "abc")
    assert [short_count(n) for n in (1, 512, 1024, 1536, 131072, 1 << 20)] == ["1", "512", "1K", "1536", "128K", "1M"]


def test_figures_of_an_earlier_evaluation_do_not_stay(tmp_path, monkeypatch):
    for name in ("needle.png", "gates.png", "position.png", "mine.png"):
        (tmp_path / name).write_bytes(b"of before")
    monkeypatch.setattr(door, "markdown", lambda report: "text")
    door._write(tmp_path, {"retrieval": [], "gates": [], "results": []})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md", "mine.png"]


def test_parts_that_take_one_process_are_refused_to_several():
    config = compose(EvaluateConfig, config_name="evaluate", overrides=["checkpoint=x", "suite=long"])
    with pytest.raises(ConfigError, match=r"^suite.parts=retrieval,gates: runs in one process; the 2 ranks of this launch share documents"):
        door._check_sharing(config, compose(RunConfig, config_name="train"), Ranks(rank=0, world_size=2, device=torch.device("cpu")))
