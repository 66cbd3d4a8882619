"""Kill, resume and change of layout: the same losses to the bit at one layout, to rounding across layouts."""

import json
from pathlib import Path

import pytest

from tests.train.helpers import KILLED_IN, STEPS, events, launch, overrides, start_ranks, steps

STAGES = (0, 1, 2, 3)
# fp32 sums in another order, carried through the steps by Adam, whose first steps divide rounding by itself.
ROUNDING = 2e-4


def _drive(jobs: list[dict], folder: Path, num_ranks: int, start=start_ranks):
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return start(["tests.train.driver", str(file)], num_ranks=num_ranks)


def _job(corpus: Path, run_dir: Path, stage: int, kill: int | None = None) -> dict:
    gates = ("evaluation.rows=3", "evaluation.gate_every_steps=4")  # an odd number: one of two ranks has a row for its shape alone
    return {"overrides": overrides(corpus, run_dir, f"parallel=zero{stage}", *gates), "kill_in_step": kill}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> dict[int, Path]:
    """For one rank and for two, a folder with one unbroken run for each ZeRO stage."""
    folders = {}
    for num_ranks in (1, 2):
        folder = folders[num_ranks] = tmp_path_factory.mktemp(f"whole_{num_ranks}")
        jobs = [_job(corpus, folder / f"zero{stage}", stage) for stage in STAGES]
        done = _drive(jobs, folder, num_ranks, launch if num_ranks > 1 else start_ranks)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_killed_run_goes_on_to_the_bit(whole, corpus, tmp_path, stage, num_ranks):
    unbroken = whole[num_ranks] / f"zero{stage}"
    killed = _drive([_job(corpus, tmp_path / "run", stage, kill=KILLED_IN)], tmp_path, num_ranks)
    assert killed.returncode != 0
    assert [step for step, _, _ in steps(tmp_path / "run")] == list(range(1, KILLED_IN))
    resumed = _drive([_job(corpus, tmp_path / "run", stage)], tmp_path, num_ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert steps(tmp_path / "run") == steps(unbroken)
    # Besides losses and gradient norms, which no other rows would give: the place in the stream, and the held-out loss of the end.
    for name in ("evaluation", "gate"):
        assert events(tmp_path / "run", name) == events(unbroken, name)
    assert _state(tmp_path / "run")["stream"] == _state(unbroken)["stream"]
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [4]


def _state(run_dir: Path) -> dict:
    return json.loads((run_dir / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())


def test_every_layout_trains_alike(whole):
    reference = steps(whole[1] / "zero0")
    assert len(reference) == STEPS and reference[-1][1] < reference[0][1]
    for folder in whole.values():
        for stage in STAGES:
            for (_, loss, norm), (_, other_loss, other_norm) in zip(reference, steps(folder / f"zero{stage}"), strict=True):
                assert other_loss == pytest.approx(loss, rel=ROUNDING)
                assert other_norm == pytest.approx(norm, rel=20 * ROUNDING)


def test_every_layout_measures_the_gate_alike(whole):
    reference = events(whole[1] / "zero0", "gate")
    assert [event["step"] for event in reference] == [4, STEPS]
    for folder in whole.values():
        for stage in STAGES:
            for event, other in zip(reference, events(folder / f"zero{stage}", "gate"), strict=True):
                assert event.keys() == other.keys()
                for name, layers in event["heads"].items():
                    assert other["heads"][name] == [pytest.approx(heads, abs=0.02) for heads in layers], name
