"""Runs inside one process: learning, switches, signals, skipped steps, run folders, checkpoints and their damage."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.registry import REPOSITORY
from configs.schema import ConfigError, DataConfig, SourceConfig, SourceFormat, TokenizerConfig
from data.loader import IGNORE, heldout_rows
from data.prepare import prepare
from data.shards import Corpus
from model.ops.moba import gate_statistics
from model.transformer import Transformer
from tests.train.helpers import STEPS, environment, events, lines, load_weights, make_run, overrides, small_disk, steps
from train import checkpoint, saving
from train.engine import Engine
from train.fragments import write_fragments
from train.initial import load_into
from train.loop import train
from train.run_dir import own_run_dir
from train.trainer import enter_stage

CHECKPOINTS = [f"step_{step:08d}" for step in (4, STEPS)]


@pytest.fixture(scope="module")
def finished(corpus, ranks, tmp_path_factory) -> Path:
    """The folder of a finished run of the standard overrides."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(make_run(corpus, folder), ranks)
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of that folder, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- learning -----------------------------------------------------------------------------------------------------------------


def test_loss_falls_on_real_text(corpus, ranks, tmp_path):
    size = ("stages.0.tokens=300_000", "stages.0.batch_tokens=1024", "parallel.micro_batch_rows=8")
    run = make_run(corpus, tmp_path / "run", *size, "optim.lr=4e-3", "evaluation.every_steps=0")
    train(run, ranks)
    losses = [loss for _, loss, _ in steps(tmp_path / "run")]
    assert losses[0] == pytest.approx(6.24, abs=0.2)  # ln 512: nothing is known at the start
    heldout_loss = events(tmp_path / "run", "evaluation")[-1]["heldout_loss"]
    assert heldout_loss < 4.5
    assert heldout_loss < _unigram_entropy(Corpus.open(corpus)) - 0.5  # it has learnt more than how often each token occurs


def test_heldout_loss_by_position_is_the_loss_of_the_tokens_there(corpus, ranks, tmp_path):
    """Against one row at a time, whose tokens are put into their buckets one by one."""
    run = make_run(corpus, tmp_path / "run", "evaluation.rows=5", "evaluation.position_bucket=48", "max_steps=1")
    train(run, ranks)
    (event,) = events(tmp_path / "run", "evaluation")
    model = Transformer(run.model, run.stages[0].attention.per_layer(2), run.stages[0].rope)
    load_into(model, tmp_path / "run" / "checkpoints" / "step_00000001")
    found, of_rows, documents = defaultdict(list), [], []
    for batch in heldout_rows(Corpus.open(corpus), seq_len=128, rows=5):
        with torch.no_grad():
            losses = model(batch.tokens.flatten(), batch.positions.flatten(), batch.cu_seqlens, batch.labels.flatten()).tolist()
        of_rows.append(sum(losses))  # nothing is lost where there is no target
        owners = [origin.document for origin, length in zip(batch.documents, batch.cu_seqlens.diff(), strict=True) for _ in range(length)]
        documents.append(sorted(set(owners), key=lambda number, row=owners: (-row.count(number), row.index(number))))
        for loss, label, position in zip(losses, batch.labels.flatten().tolist(), batch.positions.flatten().tolist(), strict=True):
            if label != IGNORE:
                found[str(position // 48 * 48)].append(loss)
    assert event["by_position"] == pytest.approx({low: sum(part) / len(part) for low, part in found.items()}, abs=1e-6)
    assert list(event["by_position"]) == ["0", "48", "96"]
    kept = json.loads((tmp_path / "run" / "heldout_rows.json").read_text())
    assert (kept["step"], kept["context"], kept["position_bucket"]) == (1, 128, 48) and len(set(kept["checksums"])) == 5
    assert np.sum(kept["targets"], axis=0).tolist() == [len(found[low]) for low in ("0", "48", "96")]
    assert np.sum(kept["nats"], axis=1) == pytest.approx(of_rows, abs=1e-3)
    assert kept["documents"] == documents and any(len(row) > 1 for row in documents)
    assert event["heldout_loss"] == pytest.approx(sum(map(sum, found.values())) / sum(map(len, found.values())), abs=1e-6)


def _unigram_entropy(corpus: Corpus) -> float:
    """Nats per token of held-out text under the frequencies of the training text."""
    tables = [corpus.split(name) for name in ("train", "heldout")]
    train_counts, heldout = (
        np.bincount(np.concatenate([table.tokens(number) for number in range(table.num_documents)]), minlength=512) for table in tables
    )
    return float(-(heldout * np.log((train_counts + 1) / (train_counts + 1).sum())).sum() / heldout.sum())


def test_one_document_is_learnt_by_heart(ranks, tmp_path):
    text = "def gate(query, means):\n    return [sum(a * b for a, b in zip(query, mean)) for mean in means]\n" * 3
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text(text)
    data = DataConfig(
        prepared_dir=str(tmp_path / "corpus"),
        sources=(SourceConfig(name="one", format=SourceFormat.FILES, path=str(tmp_path / "texts")),),
        tokenizer=TokenizerConfig(vocab_size=300),
        heldout_fraction=0.0,
        num_workers=1,
    )
    prepare(data)
    learning = ("stages.0.tokens=61_440", "optim.lr=5e-3", "optim.weight_decay=0", "evaluation.rows=0", "parallel.micro_batch_rows=4")
    run = make_run(Path(data.prepared_dir), tmp_path / "run", *learning)
    train(run, ranks)
    assert steps(tmp_path / "run")[-1][1] < 0.1


# --- stages and switches --------------------------------------------------------------------------------------------------------


def test_a_switch_between_full_and_moba_keeps_weights_and_is_logged(corpus, ranks, tmp_path):
    run = make_run(corpus, tmp_path / "run")
    first = replace(run.stages[0], tokens=4 * 512)
    second = replace(first, name="full", attention=replace(first.attention, rule="full"))
    train(replace(run, stages=(first, second)), ranks)
    (switch,) = events(tmp_path / "run", "switch")
    assert switch["step"] == 4 and switch["stage"] == "full"
    assert switch["loss_before"] != switch["loss_after"]
    (before,) = [event["heldout_loss"] for event in events(tmp_path / "run", "evaluation") if event["step"] == 4]
    assert switch["loss_before"] == before


def test_a_stage_brings_its_workspace(corpus, tmp_path):
    run = make_run(corpus, tmp_path / "run", "stages.0.attention.workspace_mib=3")
    model = Transformer(run.model, run.stages[0].attention.per_layer(run.model.num_layers), run.stages[0].rope)
    enter_stage(model, run, run.stages[0])
    assert model.workspace == 3 * 2**20


def test_a_resume_at_the_step_of_a_switch_goes_on_to_the_bit(corpus, ranks, tmp_path):
    run = make_run(corpus, tmp_path / "whole")
    first = replace(run.stages[0], tokens=4 * 512)
    longer = replace(first, name="longer", seq_len=256, attention=replace(first.attention, rule="last 1 full, rest moba"))
    run = replace(run, stages=(first, longer))
    train(run, ranks)
    train(replace(run, run_dir=str(tmp_path / "broken"), max_steps=4), ranks)
    train(replace(run, run_dir=str(tmp_path / "broken")), ranks)
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")
    assert events(tmp_path / "broken", "switch") == events(tmp_path / "whole", "switch")
    assert [line["context"] for line in lines(tmp_path / "whole") if "event" not in line] == [128] * 4 + [256] * 4


def test_full_and_moba_checkpoints_interchange(finished, corpus, ranks, tmp_path):
    source = finished / "checkpoints" / CHECKPOINTS[0]
    weights = load_weights(source)
    run = make_run(corpus, tmp_path / "run", "attention.rule=full", f"resume={source}", "max_steps=5")
    train(run, ranks)
    assert [step for step, _, _ in steps(tmp_path / "run")] == [5]
    after = load_weights(tmp_path / "run" / "checkpoints" / "step_00000005")
    assert after.keys() == weights.keys()
    assert any(not torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_read_back_are_the_same_at_every_zero_stage(finished, corpus, ranks, tmp_path, stage):
    train(make_run(corpus, tmp_path / "run", f"parallel=zero{stage}"), ranks)
    reference = load_weights(finished / "checkpoints" / CHECKPOINTS[1])
    weights = load_weights(tmp_path / "run" / "checkpoints" / CHECKPOINTS[1])
    assert weights.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_accumulation_changes_nothing_but_rounding(finished, corpus, ranks, tmp_path):
    train(make_run(corpus, tmp_path / "run", "parallel.micro_batch_rows=4"), ranks)
    for (_, loss, norm), (_, other_loss, other_norm) in zip(steps(finished), steps(tmp_path / "run"), strict=True):
        assert other_loss == pytest.approx(loss, rel=2e-4)
        assert other_norm == pytest.approx(norm, rel=4e-3)


def test_bf16_follows_fp32_and_goes_on_to_the_bit(finished, corpus, ranks, tmp_path):
    train(make_run(corpus, tmp_path / "whole", "parallel.precision=bf16"), ranks)
    for (_, loss, _), (_, other, _) in zip(steps(finished), steps(tmp_path / "whole"), strict=True):
        assert other == pytest.approx(loss, rel=5e-3) and other != loss
    for last in (4, 8):
        train(make_run(corpus, tmp_path / "broken", "parallel.precision=bf16", f"max_steps={last}"), ranks)
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")


# --- interruption and skipped steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_step_saves_that_step(corpus, ranks, tmp_path, monkeypatch, number):
    plain = Engine.step

    def step(self, lr):
        if lr == 1e-3 or len(steps(tmp_path / "run")) == 2:
            os.kill(os.getpid(), number)
        return plain(self, lr)

    monkeypatch.setattr(Engine, "step", step)
    train(make_run(corpus, tmp_path / "run"), ranks)
    assert len(steps(tmp_path / "run")) == 3
    assert checkpoint.resolve(str(tmp_path / "run"), print).name == "step_00000003"


def test_a_run_in_trouble_saves_nothing_over_good_checkpoints(corpus, ranks, tmp_path, monkeypatch):
    plain = Engine.micro_step
    calls = iter(range(10**6))

    def poisoned(self, batch, *, weight, last):
        return plain(self, batch, weight=weight if next(calls) <= 3 * 4 else float("inf"), last=last)

    monkeypatch.setattr(Engine, "micro_step", poisoned)
    with pytest.raises(ConfigError, match="max_skipped_in_a_row=5"):
        train(make_run(corpus, tmp_path / "run", "checkpoint.every_steps=1"), ranks)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*")) == ["step_00000002", "step_00000003"]


def test_sigterm_on_the_command_line_saves_and_exits_0(corpus, tmp_path):
    command = [sys.executable, "-m", "train.main", *overrides(corpus, tmp_path / "run", "stages.0.tokens=10_000_000")]
    program = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    program.send_signal(signal.SIGTERM)
    _, complaint = program.communicate(timeout=60)
    assert program.returncode == 0, complaint
    saved = checkpoint.resolve(str(tmp_path / "run"), print)
    assert saved.name == f"step_{len(steps(tmp_path / 'run')):08d}" and len(steps(tmp_path / "run")) > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_non_finite_gradient_is_skipped_counted_and_named(corpus, ranks, tmp_path, monkeypatch, stage):
    plain, calls = Engine.micro_step, iter(())

    def poisoned(self, batch, *, weight, last):
        # Call 0 is the dry run; 4 micro-batches make a step: the second micro-batch of step 3 is bad.
        return plain(self, batch, weight=float("inf") if next(calls) == 1 + 2 * 4 + 1 else weight, last=last)

    monkeypatch.setattr(Engine, "micro_step", poisoned)
    for name, last in (("whole", 5), ("run", 4)):
        calls = iter(range(10**6))
        train(make_run(corpus, tmp_path / name, f"parallel=zero{stage}", f"max_steps={last}"), ranks)
    (skip,) = events(tmp_path / "run", "skipped")
    assert skip["step"] == 3 and skip["documents"]
    assert [line["skipped_steps"] for line in lines(tmp_path / "run") if "event" not in line] == [0, 0, 1, 1]
    assert all(torch.isfinite(value).all() for value in load_weights(tmp_path / "run/checkpoints/step_00000004").values())
    # Later steps stay finite: nothing of the bad gradient is left in a buffer.
    assert lines(tmp_path / "run")[-3]["grad_norm"] is not None
    monkeypatch.undo()
    train(make_run(corpus, tmp_path / "run", f"parallel=zero{stage}", "max_steps=5"), ranks)  # Adam goes on from three updates, not four
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")


def test_too_many_skipped_steps_stop_the_run(corpus, ranks, tmp_path, monkeypatch):
    plain = Engine.micro_step

    def poisoned(self, batch, *, weight, last):
        return plain(self, batch, weight=weight * float("nan"), last=last)

    monkeypatch.setattr(Engine, "micro_step", poisoned)
    with pytest.raises(ConfigError, match=r"max_skipped_in_a_row=2: that many steps in a row up to step 2 .* training documents \[\d+"):
        train(make_run(corpus, tmp_path / "run", "max_skipped_in_a_row=2"), ranks)


# --- run folders -----------------------------------------------------------------------------------------------------------------


def test_the_run_folder_tells_how_it_was_made(finished):
    assert json.loads((finished / "config.json").read_text())["stages"][0]["attention"]["block_size"] == 32
    (launch,) = [json.loads(line) for line in (finished / "launches.jsonl").read_text().splitlines()]
    assert {"command", "git", "packages", "world_size", "machine"} <= launch.keys()
    line = lines(finished)[0]
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu_dense_equivalent", "mfu_executed", "memory_gib", "skipped_steps",
            "context", "data_wait"} <= line.keys()  # fmt: skip
    assert not list((finished / "checkpoints").glob(".*"))


def test_a_finished_run_is_left_as_it_is(copied, corpus, ranks):
    before = steps(copied)
    train(make_run(corpus, copied), ranks)
    assert steps(copied) == before


def test_the_folder_of_another_run_is_refused(copied, corpus, ranks):
    with pytest.raises(ConfigError, match=r"belongs to another run: optim.lr is 0.001 there and 0.002 here"):
        train(make_run(corpus, copied, "optim.lr=2e-3"), ranks)
    (copied / "config.json").unlink()
    with pytest.raises(ConfigError, match="is not empty and no run made it"):
        train(make_run(corpus, copied), ranks)


def test_how_a_run_is_computed_may_change(copied, corpus, ranks):
    """What another number or kind of GPUs may ask for; the run goes on with it, and knows its folder again afterwards."""
    layout = (
        "activation.rule=full",
        "attention.backend=torch",
        "attention.workspace_mib=64",
        "parallel.loss=torch",
        "parallel.ffn_tile=32",
    )
    layout += ("parallel=zero1", "parallel.compile=never", "checkpoint.background=false", "profile.steps=1..1")
    before = steps(copied)
    train(make_run(corpus, copied, *layout), ranks)
    assert steps(copied) == before
    assert json.loads((copied / "config.json").read_text())["stages"][0]["activation"]["rule"] == "full"


def test_the_folder_of_a_run_that_lacks_later_settings_is_still_its_own(copied, corpus, ranks):
    """A config.json as a version before these settings wrote it, and as one with settings that are gone."""
    before = json.loads((copied / "config.json").read_text())
    del before["init_from"], before["optim"]["decay_tokens"], before["model"]["key_conv"]
    del before["stages"][0]["rope"]["nope"], before["stages"][0]["attention"]["workspace_mib"]
    (copied / "config.json").write_text(json.dumps(before))
    train(make_run(corpus, copied), ranks)
    assert len(events(copied, "resume")) == 1
    (copied / "config.json").write_text(json.dumps(before | {"colour": "blue"}))
    with pytest.raises(
        ConfigError, match=r"config.json is of another version of this program \(colour: no such key.*\); choose another folder$"
    ):
        train(make_run(corpus, copied), ranks)


def test_resume_never_refuses_to_train_over_checkpoints(copied, corpus, ranks):
    with pytest.raises(ConfigError, match=r"resume=never: .* holds checkpoints"):
        train(make_run(corpus, copied, "resume=never"), ranks)


def test_retention_keeps_the_last_and_the_multiples(corpus, ranks, tmp_path):
    train(make_run(corpus, tmp_path / "run", "checkpoint.every_steps=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3"), ranks)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == [f"step_{step:08d}" for step in (3, 6, 7, 8)]
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_00000008"


def test_a_run_that_is_thrown_away_saves_what_is_due_and_not_its_end(corpus, ranks, tmp_path):
    train(make_run(corpus, tmp_path / "run", "checkpoint.every_steps=5", "checkpoint.at_end=false"), ranks)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000005"]
    assert len(steps(tmp_path / "run")) == STEPS


def test_a_checkpoint_of_another_model_is_refused(finished, corpus, ranks, tmp_path):
    source = finished / "checkpoints" / CHECKPOINTS[1]
    with pytest.raises(ConfigError, match=r"model.ffn_size is 176 in the checkpoint of step 8 and 128 here"):
        train(make_run(corpus, tmp_path / "run", "model.ffn_size=128", f"resume={source}"), ranks)
    assert not (tmp_path / "run").exists()


def test_one_launch_at_a_time_holds_a_run_folder(copied, corpus, ranks):
    run = make_run(corpus, copied)
    with own_run_dir(run), pytest.raises(ConfigError, match=r"run_dir=.*: another launch is training in it"):
        train(run, ranks)


def test_a_run_that_saved_nothing_may_start_again_with_other_settings(copied, corpus, ranks):
    shutil.rmtree(copied / "checkpoints")
    train(make_run(corpus, copied, "optim.lr=2e-3", "max_steps=1"), ranks)
    assert [step for step, _, _ in steps(copied)] == [1]


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_run_folder_that_cannot_be_made_is_named(corpus, ranks, tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run_dir=.*: cannot be written"):
        train(make_run(corpus, tmp_path / place), ranks)


def test_held_out_rows_of_a_later_stage_are_asked_for_at_the_start(corpus, ranks, tmp_path):
    run = make_run(corpus, tmp_path / "run")
    longer = replace(run.stages[0], name="longer", seq_len=2**18, batch_tokens=2**18)
    with pytest.raises(ConfigError, match=r"seq_len=262144: the held-out documents"):
        train(replace(run, stages=(run.stages[0], longer)), ranks)
    assert not (tmp_path / "run").exists()


# --- branches --------------------------------------------------------------------------------------------------------------------


def test_a_branch_trains_with_the_optimizer_settings_of_its_config(finished, corpus, ranks, tmp_path, monkeypatch):
    seen = []
    plain = Engine.step

    def step(self, lr):
        seen.append([(group["weight_decay"], group["betas"], group["eps"]) for group in self._optimizer.param_groups])
        return plain(self, lr)

    monkeypatch.setattr(Engine, "step", step)
    changed = ("optim.weight_decay=0.5", "optim.beta1=0.8", "optim.eps=1e-6", "max_steps=5")
    train(make_run(corpus, tmp_path / "run", f"resume={finished / 'checkpoints' / CHECKPOINTS[0]}", *changed), ranks)
    assert seen == [[(0.5, (0.8, 0.95), 1e-6), (0.0, (0.8, 0.95), 1e-6)]]


def test_a_branch_launched_again_goes_on_from_its_own_checkpoint(finished, corpus, ranks, tmp_path, capfd):
    branch = (f"resume={finished / 'checkpoints' / CHECKPOINTS[0]}", "optim.lr=2e-3")
    for last in (6, 8):
        train(make_run(corpus, tmp_path / "run", *branch, f"max_steps={last}"), ranks)
    assert [step for step, _, _ in steps(tmp_path / "run")] == [5, 6, 7, 8]
    assert "going on from step_00000006" in capfd.readouterr().err


def test_a_run_does_not_go_back_in_its_own_folder(copied, corpus, ranks):
    with pytest.raises(ConfigError, match=rf"{CHECKPOINTS[1]} comes after it in this run_dir"):
        train(make_run(corpus, copied, f"resume={copied / 'checkpoints' / CHECKPOINTS[0]}"), ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.0.batch_tokens=1024", r"checkpoint of step 4 has seen 2048 tokens, these stages put 4096 before that step"),
        ("model.tie_embeddings=false", r"model.tie_embeddings is True in the checkpoint of step 4 and False here"),
    ],
)
def test_a_branch_that_cannot_go_on_is_refused(finished, corpus, ranks, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        train(make_run(corpus, tmp_path / "run", f"resume={finished / 'checkpoints' / CHECKPOINTS[0]}", change), ranks)
    assert not (tmp_path / "run").exists()


# --- damage ------------------------------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"), [(_cut, r"has \d+ bytes instead of \d+"), (_flip, "does not match"), (Path.unlink, "is missing")]
)
def test_a_damaged_checkpoint_is_refused_by_name_and_auto_takes_the_one_before(copied, corpus, ranks, capfd, damage, says):
    newest = copied / "checkpoints" / CHECKPOINTS[1]
    damage(next((newest / "engine").iterdir()))
    with pytest.raises(
        ConfigError, match=rf"{newest}: is damaged: .*rank_00000_00000.safetensors.* {says}.*{CHECKPOINTS[0]} before it is whole"
    ):
        train(make_run(corpus, copied, f"resume={newest}"), ranks)
    whole = steps(copied)
    train(make_run(corpus, copied), ranks)
    assert "trying the one before it" in capfd.readouterr().err
    assert steps(copied) == whole
    checkpoint.verify(newest)
    assert (copied / "checkpoints" / f"damaged_{newest.name}").is_dir()


def test_a_damaged_checkpoint_pushes_no_whole_one_out(copied, corpus, ranks):
    _cut(copied / "checkpoints" / CHECKPOINTS[1] / "state.json")
    train(make_run(corpus, copied, "checkpoint.keep_last=1", "max_steps=6"), ranks)
    assert sorted(path.name for path in (copied / "checkpoints").glob("step_*")) == ["step_00000006"]


@pytest.mark.parametrize("content", ["[]", "12", '{"files": {"x": {}}}', '{"fil'])
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"is damaged, or not a checkpoint: manifest.json"):
        checkpoint.resolve(str(tmp_path), print)


def test_when_every_checkpoint_is_damaged_nothing_is_started(copied, corpus, ranks):
    for name in CHECKPOINTS:
        (copied / "checkpoints" / name / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="all 2 checkpoints are damaged"):
        train(make_run(corpus, copied), ranks)


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _on_a_small_disk(*arguments: object) -> None:
    with small_disk():  # for the last checkpoint alone, which the run waits for: it is this whole process's
        write_fragments(*arguments)


@pytest.mark.parametrize(
    ("failing", "write", "before"),
    [(1, _no_space, "there is no earlier checkpoint"), (2, _on_a_small_disk, "step_00000004 before it is whole")],
)
def test_a_full_disk_is_loud_and_leaves_the_checkpoint_before_it_whole(corpus, ranks, tmp_path, monkeypatch, failing, write, before):
    calls = iter(range(1, 10**6))
    monkeypatch.setattr(saving, "write_fragments", lambda *a: (write_fragments if next(calls) < failing else write)(*a))
    told = rf"^checkpoint of step {4 * failing} could not be written to .*checkpoints: the disk is full; {before}$"
    with pytest.raises(ConfigError, match=told):
        train(make_run(corpus, tmp_path / "run"), ranks)
    whole = CHECKPOINTS[: failing - 1]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == (["latest", *whole] if whole else [])
    for name in whole:
        checkpoint.verify(tmp_path / "run/checkpoints" / name)


def test_a_checkpoint_that_cannot_fit_is_not_begun(copied, corpus, ranks, monkeypatch):
    usage = shutil.disk_usage(copied)
    shutil.rmtree(copied / "checkpoints" / CHECKPOINTS[1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"no room for a checkpoint .* 1000 are free; step_00000004 before it is whole"):
        train(make_run(corpus, copied), ranks)


# --- corpus against run --------------------------------------------------------------------------------------------------------------


def test_a_vocabulary_larger_than_the_models_is_refused(corpus, ranks, tmp_path):
    with pytest.raises(ConfigError, match=f"model.vocab_size=300: is smaller than the {Corpus.open(corpus).vocab_size} tokens of"):
        train(make_run(corpus, tmp_path / "run", "model.vocab_size=300"), ranks)


def test_a_missing_corpus_names_the_command(ranks, tmp_path):
    with pytest.raises(ConfigError, match=r"scripts\.prepare_data"):
        train(make_run(tmp_path / "nowhere", tmp_path / "run"), ranks)
    assert not (tmp_path / "run").exists()


# --- figures -----------------------------------------------------------------------------------------------------------------------


def test_wandb_offline_and_tensorboard_get_the_figures(corpus, ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = ("logging.wandb=true", "logging.tensorboard=true", "evaluation.gate_every_steps=2", "max_steps=2")
    train(make_run(corpus, tmp_path / "run", *more), ranks)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events_read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events_read.Reload()
    assert [round(point.value, 4) for point in events_read.Scalars("loss")] == [round(loss, 4) for _, loss, _ in steps(tmp_path / "run")]
    assert "evaluation/heldout_loss" in events_read.Tags()["scalars"]
    (gate,) = events(tmp_path / "run", "gate")
    for layer in range(2):
        (point,) = events_read.Scalars(f"gate/mass/layer_{layer}")
        assert point.value == pytest.approx(gate["mass"][f"layer_{layer}"]) == pytest.approx(np.mean(gate["heads"]["mass"][layer]))


def test_the_gate_is_measured_on_what_the_layers_attend_with(corpus, ranks, tmp_path):
    """One layer is full, the other's figures are those of its q and k on the held-out rows."""
    run = make_run(corpus, tmp_path / "run", 'attention.rule="last 1 full, rest moba"', "evaluation.gate_every_steps=2", "max_steps=2")
    train(run, ranks)
    (event,) = events(tmp_path / "run", "gate")
    model = Transformer(run.model, run.stages[0].attention.per_layer(2), run.stages[0].rope).eval()
    load_into(model, tmp_path / "run" / "checkpoints" / "step_00000002")
    found = []

    def see(layer, q, k, v, cu_seqlens):
        if layer == 0:
            found.append(gate_statistics(q, k, block_size=32, topk=2, num_queries=64, cu_seqlens=cu_seqlens))

    with torch.no_grad(), model.observed(see):
        for batch in heldout_rows(Corpus.open(corpus), seq_len=128, rows=2):
            model(batch.tokens.flatten(), batch.positions.flatten(), batch.cu_seqlens)
    expected = (found[0] + found[1]).means()
    assert event["heads"] == {name: [pytest.approx(heads, abs=1e-5), None] for name, heads in expected.items()}
    assert event["mass"].keys() == {"layer_0"} and 0 < event["mass"]["layer_0"] < event["best_mass"]["layer_0"] < 1


def test_statistics_of_a_gate_need_rows_and_a_choice(corpus, ranks, tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation.gate_every_steps=4: needs held-out rows; set rows above 0"):
        make_run(corpus, tmp_path / "run", "evaluation.gate_every_steps=4", "evaluation.rows=0")
    train(make_run(corpus, tmp_path / "run", "attention.rule=full", "evaluation.gate_every_steps=1", "max_steps=1"), ranks)
    assert events(tmp_path / "run", "gate") == []


def test_a_terminal_gets_lines(corpus, ranks, tmp_path, capfd):
    train(make_run(corpus, tmp_path / "run", "logging.progress=true", "logging.every_steps=2", "max_steps=4"), ranks)
    shown = capfd.readouterr().err
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("step ")] == ["2", "4"]
    assert "event=evaluation step=4 heldout_loss=" in shown


def test_max_steps_is_where_a_run_stops_and_stays(corpus, ranks, tmp_path):
    for _ in range(2):
        train(make_run(corpus, tmp_path / "run", "max_steps=3"), ranks)
    assert [step for step, _, _ in steps(tmp_path / "run")] == [1, 2, 3]
