"""Ranks that share rows: losses and every gradient, runs, evaluation, and what is refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.helpers import events, lines, overrides, start_ranks
from tests.train.shared_rows import Case

# fp32 beside fp64; one rank without DeepSpeed errs as much.
ROUNDING = 5e-6
FEATURES = {"key_conv": 3, "qk_norm": True, "qkv_bias": True, "head_dim": 8}
HYBRID = {"rule": "every 2 moba(8, 3), rest sliding(7)", "nope": "every 2", "micro_batches": 2}


def _layouts(degree: int, rules: tuple[str, ...]) -> list[Case]:
    """Every ZeRO stage, with accumulation and without."""
    return [
        Case(zero=zero, degree=degree, rule=rule, micro_batches=number)
        for zero, rule, number in itertools.product((0, 1, 2, 3), rules, (1, 3))
    ]


def _heads(degree: int, zero: int) -> list[Case]:
    """All that touches q, k and v; fewer KV heads than ranks, as many, and numbers that share no or some divisors with the ranks'."""
    return [
        Case(zero=zero, degree=degree, model=FEATURES | {"num_heads": q_heads, "num_kv_heads": kv_heads}, **HYBRID)
        for q_heads, kv_heads in ((4, 1), (4, 4), (12, 6), (12, 3))
    ]


# Gloo, or NCCL where there are as many GPUs.
GPUS = [pytest.param(False, id="gloo"), pytest.param(True, id="nccl", marks=pytest.mark.gpu)]


def _check(cases: list[Case], folder: Path, *, num_ranks: int, gpus: bool = False) -> None:
    """Gradients in all cases, the losses of a document, and the bytes that are held and sent."""
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = ["tests.train.shared_rows", str(folder / "cases.json"), str(folder / "found.json")]
    done = start_ranks(arguments, num_ranks=num_ranks, gpus=gpus)
    assert done.returncode == 0, done.stderr
    shown = json.loads((folder / "found.json").read_text())
    found = shown["errors"]
    worst = {name: max(errors[name] for errors in found if name in errors) for name in dict.fromkeys(itertools.chain(*found))}
    print(
        f"{num_ranks} ranks, {len(cases)} cases, worst relative errors:",
        *(f"{name} {error:.1e}" for name, error in worst.items()),
        sep="\n",
    )
    for case, errors in zip(cases, found, strict=True):
        assert {name: error for name, error in errors.items() if not error < ROUNDING} == {}, case
    assert shown["scored"] < 1e-6
    assert shown["gates"]["error"] < 1e-5 and shown["gates"]["between_heads"] > 0.1
    for counted, reckoned in shown["sent"].values():
        assert counted == reckoned > 0
    for counted, reckoned in shown["held"].values():
        assert reckoned == pytest.approx(counted, rel=1e-3)  # copies of convolutions' weights are not reckoned


@pytest.mark.parametrize("gpus", GPUS)
def test_two_ranks_that_share_rows_have_the_gradients_of_one(tmp_path, gpus):
    rows = [Case(zero=zero, degree=2, rule="moba(8, 3)", micro_batches=2, rows=3) for zero in (1, 3)]
    rules = ((1, "first 1 full, rest selective"), (3, "first 1 full, rest offload"))
    kept = [Case(zero=zero, degree=2, rule="moba(8, 2)", micro_batches=2, activation=rule) for zero, rule in rules]
    compiled = [Case(zero=1, degree=2, rule="full", micro_batches=2, compiled=True)]
    cases = [*_layouts(2, ("full", "moba(8, 2)")), *_heads(2, 1), *rows, *kept, *compiled]
    _check(cases, tmp_path, num_ranks=2, gpus=gpus)


def test_four_ranks_that_share_rows_have_the_gradients_of_one(tmp_path):
    """Two KV heads: each is on two ranks."""
    meshes = [Case(zero=zero, degree=2, rule="moba(8, 2)", micro_batches=3) for zero in (1, 3)]
    _check([*_layouts(4, ("last 1 full, rest moba(8, 2)",)), *_heads(4, 1), *meshes], tmp_path, num_ranks=4)


@pytest.mark.slow
def test_every_mesh_of_four_ranks_has_the_gradients_of_one(tmp_path):
    layouts = [case for degree in (1, 2, 4) for case in _layouts(degree, ("full", "moba(8, 2)"))]
    heads = [case for degree in (2, 4) for zero in (2, 3) for case in _heads(degree, zero)]
    _check([*layouts, *heads], tmp_path, num_ranks=4)


# --- whole runs ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=GPUS)
def runs(corpus, tmp_path_factory, request) -> Path:
    """A folder of runs on two ranks that differ in how the ranks are laid out; `changed` changes its layout half way."""
    folder = tmp_path_factory.mktemp("runs")
    model = ("attention.rule='last 1 full, rest moba'", "model.key_conv=3", "parallel.micro_batch_tokens=128")
    evaluated = ("evaluation.position_bucket=32", "evaluation.gate_every_steps=4", "device=auto")
    shared = "parallel.sequence_parallel=2"
    plans = [
        ("data", []),
        ("shared", [shared]),
        ("shared_zero3", [shared, "parallel=zero3"]),
        ("shared_bf16", [shared, "parallel.precision=bf16"]),
        ("changed", [shared, "max_steps=4"]),
        ("changed", []),
    ]
    jobs = [{"overrides": overrides(corpus, folder / name, *model, *evaluated, *more), "kill_in_step": None} for name, more in plans]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = start_ranks(["tests.train.driver", str(folder / "jobs.json")], num_ranks=2, gpus=request.param)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["shared", "shared_zero3", "changed"])
def test_a_run_does_not_depend_on_how_ranks_are_laid_out(runs, name):
    """The same rows and losses; figures of whole rows are counted once."""
    for ours, theirs in zip(_steps(runs / name), _steps(runs / "data"), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=4e-3 if key == "grad_norm" else 2e-4)
        for key in ("tokens", "tokens_by", "padding", "epochs", "lr"):
            assert ours[key] == theirs[key]
        flops = [line["flops_executed_per_second"] * line["step_seconds"] for line in (ours, theirs)]
        assert flops[0] == pytest.approx(flops[1], rel=1e-9)
    for ours, theirs in zip(events(runs / name, "evaluation"), events(runs / "data", "evaluation"), strict=True):
        assert ours["heldout_loss"] == pytest.approx(theirs["heldout_loss"], rel=2e-4)
        assert ours["by_position"] == pytest.approx(theirs["by_position"], rel=2e-4) and len(ours["by_position"]) == 4
    ours, theirs = (json.loads((runs / each / "heldout_rows.json").read_text()) for each in (name, "data"))
    assert all(ours[key] == theirs[key] for key in ("step", "checksums", "documents", "targets")) and len(set(ours["checksums"])) > 1
    assert np.array(ours["nats"]) == pytest.approx(np.array(theirs["nats"]), rel=2e-3)
    for ours, theirs in zip(events(runs / name, "gate"), events(runs / "data", "gate"), strict=True):
        assert ours["mass"] == pytest.approx(theirs["mass"], abs=0.02)


def test_bf16_follows_fp32(runs):
    for ours, theirs in zip(_steps(runs / "shared_bf16"), _steps(runs / "data"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3) and ours["loss"] != theirs["loss"]


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run_dir) if "event" not in line]
