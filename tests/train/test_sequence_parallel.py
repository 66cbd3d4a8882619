"""Ranks that share rows: losses and every gradient, runs, evaluation, and what is refused."""

import itertools
import json
from pathlib import Path

import pytest

from tests.train.gradients import Case
from tests.train.helpers import start_ranks

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


def _check(cases: list[Case], folder: Path, *, num_ranks: int) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    done = start_ranks(["tests.train.gradients", str(folder / "cases.json"), str(folder / "errors.json")], num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "errors.json").read_text())
    worst = {name: max(errors[name] for errors in found if name in errors) for name in dict.fromkeys(itertools.chain(*found))}
    print(
        f"{num_ranks} ranks, {len(cases)} cases, worst relative errors:",
        *(f"{name} {error:.1e}" for name, error in worst.items()),
        sep="\n",
    )
    for case, errors in zip(cases, found, strict=True):
        assert {name: error for name, error in errors.items() if not error < ROUNDING} == {}, case


def test_two_ranks_that_share_rows_have_the_gradients_of_one(tmp_path):
    rows = [Case(zero=zero, degree=2, rule="moba(8, 3)", micro_batches=2, rows=3) for zero in (1, 3)]
    blocks = [Case(zero=zero, degree=2, rule="moba(8, 2)", micro_batches=2, blocks="checkpointed") for zero in (1, 3)]
    compiled = [Case(zero=1, degree=2, rule="full", micro_batches=2, blocks="compiled")]
    cases = [*_layouts(2, ("full", "moba(8, 2)")), *_heads(2, 1), *rows, *blocks, *compiled]
    _check(cases, tmp_path, num_ranks=2)


def test_four_ranks_that_share_rows_have_the_gradients_of_one(tmp_path):
    """Two KV heads: each is on two ranks."""
    meshes = [Case(zero=zero, degree=2, rule="moba(8, 2)", micro_batches=3) for zero in (1, 3)]
    _check([*_layouts(4, ("last 1 full, rest moba(8, 2)",)), *_heads(4, 1), *meshes], tmp_path, num_ranks=4)


@pytest.mark.slow
def test_every_mesh_of_four_ranks_has_the_gradients_of_one(tmp_path):
    layouts = [case for degree in (1, 2, 4) for case in _layouts(degree, ("full", "moba(8, 2)"))]
    heads = [case for degree in (2, 4) for zero in (2, 3) for case in _heads(degree, zero)]
    _check([*layouts, *heads], tmp_path, num_ranks=4)
