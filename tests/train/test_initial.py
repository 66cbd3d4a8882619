"""Runs that begin with weights that exist: converted ones, grown ones, those of a checkpoint; and the way back to transformers."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from configs.registry import compose
from configs.schema import (
    BenchmarkConfig,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    PlanConfig,
    RopeScaling,
    RunConfig,
    TokenizerConfig,
    TokenizerKind,
)
from data.loader import build_loader
from data.prepare import prepare
from data.shards import Corpus
from scripts import convert as door
from scripts.attention_benchmark.trained import Trained
from scripts.evaluate import evaluate
from tests.model.test_huggingface import ROPES, make_theirs
from tests.train.helpers import corpus_config, events, load_weights, make_run, overrides, start_ranks, steps
from train.loop import train
from train.plan import Plan, make_plan

_FP32 = ("parallel.precision=fp32: the time is that of bf16 matrix products; fp32 ones are slower",)
SIZE = {"vocab_size": 512, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def convert():
    """Runs scripts.convert in this process."""

    def run(*arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["convert", *map(str, arguments)])
            door.main()

    return run


@pytest.fixture(scope="module")
def released(corpus, convert, tmp_path_factory) -> Path:
    """A folder that holds `hf`, a Llama of transformers with the corpus's tokenizer and an odd base, and `ours`, it converted."""
    folder = tmp_path_factory.mktemp("released")
    make_theirs("llama", ROPES["default"], tied=True, **SIZE).save_pretrained(folder / "hf")
    shutil.copyfile(corpus / "tokenizer.model", folder / "hf" / "tokenizer.model")
    convert("from_hf", folder / "hf", folder / "ours")
    return folder


def arguments(corpus: Path, run_dir: Path, init: Path | str, *more: str) -> list[str]:
    return [text for text in overrides(corpus, run_dir, f"init_from={init}", *more) if text != "model=tiny"]


def make(corpus: Path, run_dir: Path, init: Path | str, *more: str) -> RunConfig:
    return compose(RunConfig, config_name="train", overrides=arguments(corpus, run_dir, init, *more))


@torch.no_grad()
def loss_of(theirs: LlamaForCausalLM, corpus: Path, run: RunConfig) -> float:
    """Mean loss in transformers over the rows of the run's first step, document by document."""
    loader = build_loader(corpus, seq_len=128, rows_per_step=4, micro_batch_rows=1, seed=run.seed)
    total, targets = 0.0, 0
    for batch in loader.next_step():
        bounds = batch.cu_seqlens.tolist()
        for start, end in itertools.pairwise(bounds):
            logits = theirs(batch.tokens.flatten()[None, start:end]).logits[0]
            labels = batch.labels.flatten()[start:end]
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            targets += int((labels != -100).sum())
    return total / targets


# --- what a run takes from the weights ------------------------------------------------------------------------------------------------


def test_model_and_positions_come_with_the_weights(corpus, released, tmp_path):
    run = make(corpus, tmp_path / "run", released / "ours")
    assert (run.model.vocab_size, run.model.hidden_size, run.model.max_seq_len, run.model.norm_eps) == (512, 32, 128, 1e-6)
    assert run.stages[0].rope.theta == 5000.0
    # What continual training changes is laid over that, on the command line or in a stage.
    longer = ("model.max_seq_len=256", "rope.scaling=linear", "rope.factor=2", "stages.0.rope.factor=4", "model.hidden_size=32")
    run = make(corpus, tmp_path / "run", released / "ours", *longer)
    rope = run.stages[0].rope
    assert (run.model.max_seq_len, rope.theta, rope.scaling, rope.factor) == (256, 5000.0, RopeScaling.LINEAR, 4.0)


def test_another_scaling_keeps_nothing_of_the_old_one_but_the_base(corpus, convert, tmp_path):
    make_theirs("llama", ROPES["llama3"], **SIZE).save_pretrained(tmp_path / "hf")
    convert("from_hf", tmp_path / "hf", tmp_path / "ours")
    assert make(corpus, tmp_path / "run", tmp_path / "ours").stages[0].rope.factor == 8.0
    for where in ("rope", "stages.0.rope"):
        rope = make(corpus, tmp_path / "run", tmp_path / "ours", f"{where}.scaling=linear", f"{where}.factor=2").stages[0].rope
        assert (rope.theta, rope.scaling, rope.factor, rope.original_max_seq_len) == (5000.0, RopeScaling.LINEAR, 2.0, 0)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["model.hidden_size=64"], "model.hidden_size=64: the weights in init_from=OURS have 32; leave model.hidden_size out"),
        (["model=small_50m"], "model.hidden_size=640: the weights in init_from=OURS have 32"),
        (["model.tie_embeddings=false"], "model.tie_embeddings=False: the weights in init_from=OURS have True"),
        (["model.num_layers=4"], "model.num_layers=4: the weights in init_from=OURS have 2"),  # the root file's own value, but asked for
        (["model.vocab_size=500"], "model.vocab_size=500: the embedding in init_from=OURS has 512 rows; it may grow, not shrink"),
        (["init_from=OURS/none"], "init_from=OURS/none: no such folder"),
        (["init_from=OURS/../hf"], "is a Hugging Face folder; `python -m scripts.convert from_hf"),
    ],
)
def test_a_contradiction_is_named_with_both_values(corpus, released, tmp_path, more, says):
    ours = str(released / "ours")
    with pytest.raises(ConfigError) as refusal:
        make(corpus, tmp_path / "run", ours, *(text.replace("OURS", ours) for text in more))
    assert says.replace("OURS", ours) in str(refusal.value)


def test_a_plan_goes_by_the_weights_and_is_made_without_them_too(corpus, released, tmp_path):
    def plan(init: Path | str, *more: str) -> Plan:
        keys = [*arguments(corpus, tmp_path / "run", init, *more), "num_gpus=1", "attention.backend=torch"]
        return make_plan(compose(PlanConfig, config_name="train", overrides=keys))

    found = plan(released / "ours")
    assert (found.config.model.hidden_size, found.config.stages[0].rope.theta, found.notes) == (32, 5000.0, _FP32)
    with pytest.raises(ConfigError, match=r"^model.num_layers=4: the weights in init_from=.* have 2; leave model.num_layers out$"):
        plan(released / "ours", "model.num_layers=4")
    other = prepare_with(tmp_path / "other", TokenizerConfig(vocab_size=400, train_bytes=100_000))
    with pytest.raises(ConfigError, match=rf"^init_from={released / 'ours'}: its weights were made with tokenizer .* the corpus in"):
        plan(released / "ours", f"data.prepared_dir={other}")
    said = f"init_from={tmp_path / 'none'}: is not there yet, so model, RoPE and tokenizer were not checked against its weights"
    assert plan(tmp_path / "none", "model=tiny").notes == (said, *_FP32)


@pytest.mark.parametrize("context", [64, 128])
def test_converted_weights_are_evaluated_as_they_are(corpus, released, tmp_path, context):
    keys = [f"checkpoint={released / 'ours'}", f"data.prepared_dir={corpus}", f"output_dir={tmp_path}", f"contexts={context}"]
    keys += ["max_documents=1", f"max_document_tokens={context}", 'attentions=["full","moba(16, 2)"]', "device=cpu"]
    report = evaluate(compose(EvaluateConfig, config_name="evaluate", overrides=keys))
    (full, moba) = (result["loss"] for result in report["results"])
    table = Corpus.open(corpus).split("heldout")
    tokens = torch.from_numpy(table.tokens(int(table.lengths.argmax()), 0, context).astype("int64"))
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(released / "hf")(tokens[None], labels=tokens[None]).loss
    assert full == pytest.approx(float(theirs), abs=1e-4) and moba != full


def test_the_attention_benchmark_takes_converted_weights(corpus, released):
    keys = [f"checkpoint={released / 'ours'}", f"data.prepared_dir={corpus}", "inputs=trained", "lengths=60", "layer=1"]
    trained = Trained.open(compose(BenchmarkConfig, config_name="benchmark", overrides=keys), torch.device("cpu"))
    theirs = LlamaForCausalLM.from_pretrained(released / "hf", dtype=torch.bfloat16)
    assert torch.equal(trained.model.layers[1].attention.k_proj.weight, theirs.model.layers[1].self_attn.k_proj.weight)
    q, k, v = trained.draw([0, 20, 60])
    assert len(q) == len(k) == 60 and k.shape == v.shape


# --- training -------------------------------------------------------------------------------------------------------------------------


def test_training_starts_at_the_loss_of_the_released_model(corpus, released, ranks, tmp_path):
    run = make(corpus, tmp_path / "run", released / "ours", "attention.rule=full", "max_steps=2")
    train(run, ranks)
    theirs = LlamaForCausalLM.from_pretrained(released / "hf")
    (_, first, _), (_, second, _) = steps(tmp_path / "run")
    assert first == pytest.approx(loss_of(theirs, corpus, run), abs=1e-4) and second != first
    assert events(tmp_path / "run", "init") == [{"event": "init", "step": 0, "weights": str(released / "ours")}]


def test_a_resume_and_a_branch_need_the_folder_no_more(corpus, released, ranks, tmp_path):
    train(make(corpus, tmp_path / "whole", released / "ours"), ranks)
    init = shutil.copytree(released / "ours", tmp_path / "gone")
    train(make(corpus, tmp_path / "broken", init, "max_steps=4"), ranks)
    shutil.rmtree(init)
    train(make(corpus, tmp_path / "broken", init), ranks)
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")
    branch = make(corpus, tmp_path / "branch", init, f"resume={tmp_path / 'broken/checkpoints/step_00000004'}", "attention.rule=full")
    train(branch, ranks)
    train(branch, ranks)  # again from its own folder
    assert [step for step, _, _ in steps(tmp_path / "branch")] == [5, 6, 7, 8]
    assert [event["step"] for event in events(tmp_path / "branch", "resume")] == [4, 8]
    with pytest.raises(ConfigError, match=f"init_from={init}: no such folder"):
        make(corpus, tmp_path / "new", init)
    with pytest.raises(ConfigError, match=r"belongs to another run: init_from is .*gone there and .*ours here"):
        train(make(corpus, tmp_path / "broken", released / "ours"), ranks)


def test_more_words_grow_the_embedding_by_its_mean(corpus, released, ranks, tmp_path, convert):
    more = ("model.vocab_size=520", "attention.rule=full", "optim.lr=1e-12", "max_steps=1")
    run = make(corpus, tmp_path / "run", released / "ours", *more)
    train(run, ranks)
    old = AutoModelForCausalLM.from_pretrained(released / "hf").get_input_embeddings().weight
    new = load_weights(tmp_path / "run/checkpoints/step_00000001")["embedding.weight"]
    torch.testing.assert_close(new[:512], old, rtol=0, atol=1e-6)
    torch.testing.assert_close(new[512:], old.mean(dim=0, keepdim=True).expand(8, -1), rtol=0, atol=1e-6)
    convert("to_hf", tmp_path / "run", tmp_path / "back")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.vocab_size == 520


def test_a_checkpoint_gives_its_weights_alone(corpus, ranks, tmp_path):
    train(make_run(corpus, tmp_path / "first", "parallel=zero0"), ranks)
    run = make(corpus, tmp_path / "second", tmp_path / "first", "optim.lr=1e-12", "max_steps=1", "seed=1", "stages.0.attention.rule=full")
    assert run.model == make_run(corpus, tmp_path / "first").model
    train(run, ranks)
    before = load_weights(tmp_path / "first/checkpoints/step_00000008")
    after = load_weights(tmp_path / "second/checkpoints/step_00000001")
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    assert [step for step, _, _ in steps(tmp_path / "second")] == [1]


def test_two_ranks_start_where_one_does_whole_or_partitioned(corpus, released, ranks, tmp_path):
    more = ("attention.rule=full", "max_steps=1", "evaluation.rows=0")
    zero = {stage: arguments(corpus, tmp_path / f"zero{stage}", released / "ours", f"parallel=zero{stage}", *more) for stage in (2, 3)}
    (tmp_path / "jobs.json").write_text(json.dumps([{"overrides": job, "kill_in_step": None} for job in zero.values()]))
    done = start_ranks(["tests.train.driver", str(tmp_path / "jobs.json")], num_ranks=2)
    assert done.returncode == 0, done.stderr
    train(make(corpus, tmp_path / "one", released / "ours", *more), ranks)
    ((_, one, norm),) = steps(tmp_path / "one")
    for stage in zero:
        ((_, loss, other),) = steps(tmp_path / f"zero{stage}")
        assert loss == pytest.approx(one, rel=1e-6) and other == pytest.approx(norm, rel=1e-4)


def test_damage_and_ranks_that_read_differently_are_one_line(corpus, released, ranks, tmp_path, monkeypatch):
    broken = Path(shutil.copytree(released / "ours", tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ConfigError, match=rf"^init_from={broken}/model.safetensors: is damaged, or not a safetensors file"):
        train(make(corpus, tmp_path / "run", broken), ranks)
    values = json.loads((broken / "model.json").read_text())
    values["model"]["ffn_size"] = 47
    (broken / "model.json").write_text(json.dumps(values))
    shutil.copyfile(released / "ours/model.safetensors", broken / "model.safetensors")
    with pytest.raises(ConfigError, match=r"ffn.gate_proj.weight has shape \[48, 32\], model.json makes it \[47, 32\]"):
        train(make(corpus, tmp_path / "run", broken), ranks)
    monkeypatch.setattr("train.initial.gather_objects", lambda value: [value, (value[0] + 1, None)])
    with pytest.raises(ConfigError, match="the ranks read different weights there"):
        train(make(corpus, tmp_path / "run", released / "ours"), ranks)
    assert not (tmp_path / "run").exists()


# --- the tokenizer --------------------------------------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused_with_both_hashes_and_its_own_is_taken(corpus, released, ranks, tmp_path):
    own = Corpus.open(corpus).tokenizer_hash
    other = prepare_with(tmp_path / "other", TokenizerConfig(vocab_size=400, train_bytes=100_000))
    found = Corpus.open(other).tokenizer_hash
    with pytest.raises(ConfigError) as refusal:
        train(make(other, tmp_path / "run", released / "ours"), ranks)
    said = str(refusal.value)
    assert f"made with tokenizer {own}, the corpus in data.prepared_dir={other} with {found}" in said
    assert said.endswith(f"prepare it with data.tokenizer.path={released / 'ours'}") and not (tmp_path / "run").exists()
    same = prepare_with(tmp_path / "same", TokenizerConfig(kind=TokenizerKind.SENTENCEPIECE, path=str(released / "ours")))
    train(make(same, tmp_path / "run", released / "ours", "max_steps=1"), ranks)


def prepare_with(folder: Path, tokenizer: TokenizerConfig) -> Path:
    values = corpus_config(folder)
    prepare(DataConfig(**{**vars(values), "tokenizer": tokenizer}))
    return folder


@pytest.mark.parametrize("rule", ["full", "last 1 full, rest moba(32, 2)"])
def test_a_trained_run_goes_to_transformers_with_its_tokenizer(corpus, ranks, tmp_path, convert, rule):
    rope = ("rope.theta=20000", "rope.scaling=yarn", "rope.factor=2", "rope.original_max_seq_len=64")
    train(make_run(corpus, tmp_path / "run", f"attention.rule='{rule}'", *rope), ranks)
    convert("to_hf", tmp_path / "run", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=rule != "full").eval()
    assert type(theirs).__name__ == ("LlamaForCausalLM" if rule == "full" else "MobaLlamaForCausalLM")
    assert theirs.config.rope_parameters["rope_theta"] == 20000.0
    # What a run that begins with these weights loses first is what transformers does.
    run = make(corpus, tmp_path / "next", tmp_path / "run", f"attention.rule='{rule}'", "max_steps=1", "seed=3")
    train(run, ranks)
    ((_, loss, _),) = steps(tmp_path / "next")
    assert loss == pytest.approx(loss_of(theirs, corpus, run), abs=1e-4)

    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "hf"), Corpus.open(corpus).tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (own.bos_id, own.eos_id)
    text = "def  gate(query):\n\treturn [1, 23]  # Fellow-Citizens of the Senate: é 漢 🙂\n"
    assert tokenizer(text).input_ids == [own.bos_id, *own.encode(text)] and tokenizer.decode(own.encode(text)) == text
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == own.eos_id


def test_a_checkpoint_without_its_tokenizer_says_where_to_put_it(corpus, ranks, tmp_path, convert, capsys):
    own = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    train(make_run(own, tmp_path / "run", "max_steps=1"), ranks)
    shutil.rmtree(own)
    convert("to_hf", tmp_path / "run", tmp_path / "hf")  # the run kept a copy
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    with pytest.raises(SystemExit):
        convert("to_hf", tmp_path / "run", tmp_path / "hf2")
    said = capsys.readouterr().err
    assert "is neither in the run's folder nor in its corpus; put it into" in said and said.endswith(f"{tmp_path / 'run/tokenizer'}\n")
    assert not (tmp_path / "hf2").exists()
