"""Runs whose layers keep less, stage by stage and under every ZeRO stage; graphs in the figures; host memory that is not there."""

import json
import re
import socket
from dataclasses import replace

import pytest
import torch

from configs.checks import check_run
from configs.schema import ActivationConfig, ConfigError
from model.accounting import parameter_counts
from model.compiled import compile_layers
from tests.train.helpers import STEPS, lines, make_run, overrides, start_ranks, steps
from train import memory
from train.engine import Engine
from train.loop import train
from train.trainer import dry_run

LESS = "first 1 selective, rest offload"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_is_the_same_whatever_is_kept(corpus, ranks, tmp_path, stage):
    """With two micro-batches a step; the first layer is computed again but for attention, the second from host memory."""
    more = (f"parallel=zero{stage}", "parallel.micro_batch_rows=2", "max_steps=3", "evaluation.rows=0", "checkpoint.every_steps=0")
    for name, rule in (("all", "none"), ("less", LESS)):
        train(make_run(corpus, tmp_path / name, *more, f"activation.rule='{rule}'"), ranks)
    assert steps(tmp_path / "less") == steps(tmp_path / "all")


def test_a_stage_keeps_what_it_says(corpus, ranks, tmp_path, monkeypatch):
    seen = []
    plain = Engine.micro_step

    def micro_step(self, batch, *, weight, last):
        seen.append(self.module.activation)
        return plain(self, batch, weight=weight, last=last)

    monkeypatch.setattr(Engine, "micro_step", micro_step)
    run = make_run(corpus, tmp_path / "run", "activation.rule=full", "stages.0.activation.rule='last 1 none, rest selective'")
    first = replace(run.stages[0], tokens=512)
    train(replace(run, stages=(first, replace(first, activation=ActivationConfig(rule="full")))), ranks)
    assert seen[1:] == [("selective", "none")] * 4 + [("full", "full")] * 4


def test_the_dry_run_takes_the_stage_that_needs_most(corpus, ranks, tmp_path, monkeypatch):
    """Which is not that of the longest rows, where those keep less."""
    run = make_run(corpus, tmp_path / "run", "model.max_seq_len=8192")
    short = replace(run.stages[0], batch_tokens=2048, seq_len=2048)
    stages = (short, replace(short, seq_len=4096, batch_tokens=4096, activation=ActivationConfig(rule="full")))
    seen = []
    monkeypatch.setattr(Engine, "micro_step", lambda self, batch, **_: seen.append(batch.tokens.shape[1]))
    engine = Engine.__new__(Engine)
    monkeypatch.setattr("train.trainer.enter_stage", lambda *_: None)
    monkeypatch.setattr(Engine, "module", property(lambda self: None))
    dry_run(replace(run, stages=stages), engine, ranks, 0)
    dry_run(replace(run, stages=(short, replace(stages[1], activation=ActivationConfig()))), engine, ranks, 0)
    assert seen == [2048, 4096]


def test_graphs_are_in_the_figures(corpus, ranks, tmp_path, monkeypatch):
    """All of them in the first line, however documents are packed, and in that after an evaluation, which has no gradients."""
    monkeypatch.setattr("train.engine.compile_layers", lambda model: compile_layers(model, backend="aot_eager"))
    torch._dynamo.reset()
    train(make_run(corpus, tmp_path / "run", "parallel.compile=always", "activation.rule=full"), ranks)
    found = [line["recompiles"] for line in lines(tmp_path / "run") if "event" not in line]
    assert found == [2, 0, 0, 0, 2, *[0] * (STEPS - 5)]
    train(make_run(corpus, tmp_path / "plain"), ranks)
    assert [line["recompiles"] for line in lines(tmp_path / "plain") if "event" not in line] == [0] * STEPS
    assert steps(tmp_path / "plain") == steps(tmp_path / "run")


def test_offload_without_the_memory_is_refused_before_anything_is_written(corpus, ranks, tmp_path, monkeypatch):
    """Nor is a model made. The copy for checkpoints counts where there is one: with it alone less is free than is needed here."""
    monkeypatch.setattr("train.loop.new_model", lambda run: pytest.fail("a model was made"))
    run = make_run(corpus, tmp_path / "run", "activation.rule=offload")
    size, copy = 2 * 128 * run.model.hidden_size * 4, 12 * parameter_counts(run.model).total
    held = replace(run, checkpoint=replace(run.checkpoint, background=False))
    alone = replace(run, stages=tuple(replace(stage, activation=ActivationConfig()) for stage in run.stages))
    inputs, copied = f"the inputs of 2 layers take {size / 1e9:.4g} GB", f"the checkpoint's copy takes {copy / 1e9:.4g} GB"
    offload, unheld = "stages.0.activation.rule='offload': ", "set checkpoint.background=false"
    for case, free, key, kept, remedies in (
        (held, size - 1, offload, inputs, "offload at most 1 layers or shorten the rows"),
        (run, copy + size - 1, offload, f"{inputs} and {copied}", f"offload at most 1 layers or shorten the rows or {unheld}"),
        (run, copy - 1, offload, f"{inputs} and {copied}", f"offload at most 0 layers or shorten the rows or {unheld}"),
        (alone, copy - 1, "checkpoint.background=true: ", copied, unheld),
    ):
        monkeypatch.setattr(memory, "free_host_memory", lambda: free)  # noqa: B023
        told = f"{key}{kept} of host memory for 1 ranks, {socket.gethostname()} has {free / 1e9:.4g} GB free; {remedies}"
        with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
            train(case, ranks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("background", "copied"), [(True, 12), (False, 0)])
def test_what_the_machine_has_free_suffices_to_the_byte(corpus, ranks, tmp_path, monkeypatch, background, copied):
    run = make_run(corpus, tmp_path / "run", "activation.rule=offload", f"checkpoint.background={background}")
    needed = 2 * 128 * run.model.hidden_size * 4 + copied * parameter_counts(run.model).total
    monkeypatch.setattr(memory, "free_host_memory", lambda: needed)
    memory.check_host_memory(run, [memory.this_machine()], gpu=False)


def test_free_host_memory_is_at_most_what_the_machine_has():
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < memory.free_host_memory() < total


def test_a_rule_that_names_no_layer_is_refused_as_the_others_are(corpus, ranks, tmp_path):
    run = make_run(corpus, tmp_path / "run", "stages.0.activation.rule='layers 9 full, rest none'")
    with pytest.raises(ConfigError, match=r"^stages.0.activation.rule='layers 9 full, rest none': layers \[9\] do not exist"):
        check_run(run, world_size=1)


@pytest.mark.slow
def test_two_ranks_under_zero_3_are_the_same_whatever_is_kept(corpus, tmp_path):
    more = ("parallel=zero3", "parallel.micro_batch_rows=1", "max_steps=3", "evaluation.rows=0", "checkpoint.every_steps=0")
    rules = {"all": "none", "less": LESS, "inputs": "full"}
    jobs = [
        {"overrides": overrides(corpus, tmp_path / name, *more, f"activation.rule='{rule}'"), "kill_in_step": None}
        for name, rule in rules.items()
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = start_ranks(["tests.train.driver", str(tmp_path / "jobs.json")], num_ranks=2)
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "all") == steps(tmp_path / "less") == steps(tmp_path / "inputs")
