"""Kill, resume and change of layout: the same losses to the bit at one layout, to rounding across layouts."""

import json
from pathlib import Path

import pytest

from tests.train.helpers import KILLED_IN, STEPS, events, launch, lines, overrides, start_ranks, steps, streamed_overrides

STAGES = (0, 1, 2, 3)
# fp32 sums in another order, carried through the steps by Adam, whose first steps divide rounding by itself.
ROUNDING = 2e-4


def _drive(jobs: list[dict], folder: Path, num_ranks: int, start=start_ranks):
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return start(["tests.train.driver", str(file)], num_ranks=num_ranks)


def _job(corpus: Path, run_dir: Path, stage: int, kill: int | None = None) -> dict:
    return {"overrides": overrides(corpus, run_dir, f"parallel=zero{stage}"), "kill_in_step": kill}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> dict[int, Path]:
    """For one rank and for two, a folder with one unbroken run for each ZeRO stage; for two also a streamed one, and a branch off it."""
    folders = {}
    for num_ranks in (1, 2):
        folder = folders[num_ranks] = tmp_path_factory.mktemp(f"whole_{num_ranks}")
        jobs = [_job(corpus, folder / f"zero{stage}", stage) for stage in STAGES]
        if num_ranks == 2:
            more = ["parallel=zero1", *streamed_overrides(corpus, folder)]
            resume = f"resume={folder}/streamed/checkpoints/step_00000004"
            for name, where in (("streamed", ()), ("streamed_branch", (resume,))):
                jobs.append({"overrides": overrides(corpus, folder / name, *more, *where), "kill_in_step": None, "group": 3000})
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
    assert events(tmp_path / "run", "evaluation") == events(unbroken, "evaluation")
    assert _state(tmp_path / "run")["stream"] == _state(unbroken)["stream"]
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [4]


def _state(run_dir: Path) -> dict:
    return json.loads((run_dir / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())


def test_a_streamed_run_on_two_ranks_goes_on_to_the_bit(whole):
    run, branch = whole[2] / "streamed", whole[2] / "streamed_branch"
    assert len(steps(run)) == STEPS and steps(branch) == steps(run)[4:]
    assert events(branch, "evaluation")[-1] == events(run, "evaluation")[-1]
    assert len(_state(run)["stream"]["ranks"]) == 2 and _state(branch)["stream"] == _state(run)["stream"]
    assert all(sum(line["tokens_by"].values()) == 2 * 512 for line in lines(run) if "event" not in line)  # by source, and by length


def test_every_layout_trains_alike(whole):
    reference = steps(whole[1] / "zero0")
    assert len(reference) == STEPS and reference[-1][1] < reference[0][1]
    for folder in whole.values():
        for stage in STAGES:
            for (_, loss, norm), (_, other_loss, other_norm) in zip(reference, steps(folder / f"zero{stage}"), strict=True):
                assert other_loss == pytest.approx(loss, rel=ROUNDING)
                assert other_norm == pytest.approx(norm, rel=20 * ROUNDING)
