"""Kill, resume and change of layout: the same losses to the bit at one layout, to rounding across layouts."""

import json
import math
import shutil
import threading
from pathlib import Path

import pytest
import torch

from configs.registry import compose
from configs.schema import ConfigError, RunConfig
from data.loader import heldout_rows
from data.shards import Corpus
from model.transformer import Transformer
from tests.train.helpers import (
    KILLED_IN,
    STEPS,
    events,
    launch,
    lines,
    load_weights,
    make_run,
    overrides,
    start_ranks,
    steps,
    streamed_overrides,
)
from train import saving
from train.engine import Engine
from train.fragments import FragmentFolder, write_fragments
from train.loop import train
from train.trainer import Trainer

STAGES = (0, 1, 2, 3)
# fp32 sums in another order, carried through the steps by Adam, whose first steps divide rounding by itself.
ROUNDING = 2e-4


def _drive(jobs: list[dict], folder: Path, num_ranks: int, start=start_ranks):
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return start(["tests.train.driver", str(file)], num_ranks=num_ranks)


def _job(corpus: Path, run_dir: Path, stage: int) -> dict:
    gates = ("evaluation.rows=3", "evaluation.gate_every_steps=4")  # an odd number: one of two ranks has a row for its shape alone
    return {"overrides": overrides(corpus, run_dir, f"parallel=zero{stage}", *gates)}


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
                jobs.append({"overrides": overrides(corpus, folder / name, *more, *where), "group": 3000})
        done = _drive(jobs, folder, num_ranks, launch if num_ranks > 1 else start_ranks)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("stage", "kill"), [(1, {"kill_in_step": KILLED_IN}), (3, {"kill_in_writing": STEPS})])
def test_a_killed_run_goes_on_to_the_bit(whole, corpus, tmp_path, stage, kill, num_ranks):
    unbroken = whole[num_ranks] / f"zero{stage}"
    killed = _drive([_job(corpus, tmp_path / "run", stage) | kill], tmp_path, num_ranks)
    assert killed.returncode != 0
    assert [step for step, _, _ in steps(tmp_path / "run")] == list(range(1, kill.get("kill_in_step", STEPS + 1)))
    checkpoints = tmp_path / "run" / "checkpoints"
    beside = [f".partial_{STEPS:08d}"] if "kill_in_writing" in kill else []
    assert sorted(path.name for path in checkpoints.iterdir()) == [*beside, "latest", "step_00000004"]
    resumed = _drive([_job(corpus, tmp_path / "run", stage)], tmp_path, num_ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert steps(tmp_path / "run") == steps(unbroken)
    # Besides losses and gradient norms, which no other rows would give: the place in the stream, and the held-out loss of the end.
    for name in ("evaluation", "gate"):
        assert events(tmp_path / "run", name) == events(unbroken, name)
    assert _state(tmp_path / "run")["stream"] == _state(unbroken)["stream"]
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [4]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000004", f"step_{STEPS:08d}"]


# --- another number of ranks, another ZeRO stage ---------------------------------------------------------------------------------------


def _as_it_was_after_step_4(run_dir: Path, copy: Path) -> Path:
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    return copy


# Ranks before, and after; each ZeRO stage goes on at its own, and some at another.
CHANGES = [(2, 1), (1, 2), pytest.param(2, 4, marks=pytest.mark.slow)]
STAGE_CHANGES = [(0, 0), (1, 1), (2, 2), (3, 3), (0, 3), (3, 1)]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_run_goes_on_with_another_number_of_ranks_and_zero_stage(whole, corpus, ranks, tmp_path, capfd, before, after):
    jobs = []
    for old, new in STAGE_CHANGES:
        run_dir = _as_it_was_after_step_4(whole[before] / f"zero{old}", tmp_path / f"{old}_{new}")
        jobs.append(_job(corpus, run_dir, new))
    if after == 1:
        for job in jobs:
            train(compose(RunConfig, config_name="train", overrides=job["overrides"]), ranks)
        said = capfd.readouterr().err
    else:
        done = _drive(jobs, tmp_path, after)
        assert done.returncode == 0, done.stderr
        said = done.stderr
    for old, new in STAGE_CHANGES:
        unbroken, resumed = whole[before] / f"zero{old}", tmp_path / f"{old}_{new}"
        assert steps(resumed)[:4] == steps(unbroken)[:4] and len(steps(resumed)) == STEPS
        for (_, loss, norm), (_, other_loss, other_norm) in zip(steps(unbroken)[4:], steps(resumed)[4:], strict=True):
            assert other_loss == pytest.approx(loss, rel=ROUNDING)
            assert other_norm == pytest.approx(norm, rel=20 * ROUNDING)
        assert _state(resumed)["stream"] == _state(unbroken)["stream"]
        rows, other_rows = (json.loads((folder / "heldout_rows.json").read_text()) for folder in (unbroken, resumed))
        assert all(rows[key] == other_rows[key] for key in ("checksums", "documents")) and len(rows["documents"]) == 3
        assert [line["tokens_by"] for line in lines(resumed) if "event" not in line] == [
            line["tokens_by"] for line in lines(unbroken) if "event" not in line
        ]
        names = [f"{count} rank{'s' if count > 1 else ''} at ZeRO {stage} in fp32" for count, stage in ((before, old), (after, new))]
        assert f"the checkpoint of step 4 was saved by {names[0]}; going on with {names[1]}" in said


@pytest.mark.parametrize("stage", STAGES)
def test_what_two_ranks_saved_is_taken_over_to_the_bit(whole, corpus, ranks, tmp_path, stage):
    """Weights and moments, and into what the forward pass uses: at each stage from ZeRO 3's files, whose stretches are cut and padded."""
    saved = whole[2] / "zero3" / "checkpoints" / f"step_{STEPS:08d}"
    run = make_run(corpus, tmp_path, f"parallel=zero{stage}")
    model = Transformer(run.model, run.stages[0].attention.per_layer(run.model.num_layers), run.stages[0].rope)
    engine = Engine(model, parallel=run.parallel, optim=run.optim, ranks=ranks)
    files = FragmentFolder(saved / "engine")
    engine.load(files, updates=STEPS)
    found = {(fragment.part, fragment.name): fragment for fragment in engine.fragments()}
    assert {name for _, name in found} == {name for name, _ in model.named_parameters()} and len(found) == 3 * len(files.shapes)
    for (part, name), fragment in found.items():
        whole_part = files.read(part, name, 0, math.prod(files.shapes[name]))
        assert fragment.start == 0 and torch.equal(fragment.values, whole_part) and bool(whole_part.any())
    rows = heldout_rows(Corpus.open(corpus), seq_len=128, rows=3)
    (event,) = [event for event in events(whole[2] / "zero3", "evaluation") if event["step"] == STEPS]
    losses = [engine.losses(row).sum().item() for row in rows]
    assert sum(losses) / rows[0].step_targets == pytest.approx(event["heldout_loss"], rel=1e-6)


def test_a_checkpoint_of_an_earlier_version_is_refused(whole, corpus, ranks, tmp_path):
    run_dir = _as_it_was_after_step_4(whole[1] / "zero1", tmp_path / "run")
    saved = run_dir / "checkpoints" / "step_00000004"
    (saved / "engine" / "rank_00000_00000.safetensors").rename(saved / "engine" / "mp_rank_00_model_states.pt")
    manifest = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(manifest.replace("rank_00000_00000.safetensors", "mp_rank_00_model_states.pt"))
    with pytest.raises(ConfigError, match=r"step_00000004/engine: holds no weights that this version of the program reads"):
        train(make_run(corpus, run_dir, "parallel=zero1"), ranks)


# --- writing while training goes on -----------------------------------------------------------------------------------------------------


def test_the_loop_goes_on_while_a_checkpoint_is_written(corpus, ranks, tmp_path, monkeypatch):
    """The checkpoint of step 4 is held back until step 7 is over, and yet of step 4; that of step 8 waits for it."""
    run_dir, held_back = tmp_path / "run", threading.Event()

    def write(*arguments):
        assert held_back.wait(60)
        return write_fragments(*arguments)

    plain = Trainer.step

    def step(self, metrics):
        plain(self, metrics)
        if self.done < 8:
            assert not (run_dir / "checkpoints" / "latest").exists()
        if self.done == 7:
            held_back.set()

    with monkeypatch.context() as patched:
        patched.setattr(saving, "write_fragments", write)
        patched.setattr(Trainer, "step", step)
        train(make_run(corpus, run_dir), ranks)
    train(make_run(corpus, tmp_path / "held", "checkpoint.background=false"), ranks)
    for number in (4, STEPS):
        one, other = (load_weights(folder / "checkpoints" / f"step_{number:08d}") for folder in (run_dir, tmp_path / "held"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    saved = events(run_dir, "checkpoint")
    assert [Path(event["path"]).name for event in saved] == ["step_00000004", f"step_{STEPS:08d}"]
    assert saved[0]["held_seconds"] < saved[0]["written_seconds"]
    assert all(event["held_seconds"] > event["written_seconds"] > 0 for event in events(tmp_path / "held", "checkpoint"))


def _state(run_dir: Path) -> dict:
    return json.loads((run_dir / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())


def test_a_streamed_run_on_two_ranks_goes_on_to_the_bit(whole):
    run, branch = whole[2] / "streamed", whole[2] / "streamed_branch"
    assert len(steps(run)) == STEPS and steps(branch) == steps(run)[4:]
    assert events(branch, "evaluation")[-1] == events(run, "evaluation")[-1]
    assert len(_state(run)["stream"]["ranks"]) == 2 and _state(branch)["stream"] == _state(run)["stream"]
    assert all(sum(line["tokens_by"].values()) == 2 * 512 for line in lines(run) if "event" not in line)  # by source, and by length


def test_a_streamed_run_at_another_number_of_ranks_is_refused(whole, corpus, ranks, tmp_path):
    settings = json.loads((whole[2] / "jobs.json").read_text())[-1]["overrides"]
    run = compose(RunConfig, config_name="train", overrides=[*settings, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(
        ConfigError, match=r"^resume: the saved stream was read by 2 data-parallel ranks, this run has 1; a streamed corpus"
    ):
        train(run, ranks)
    assert not (tmp_path / "run" / "checkpoints").exists()


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
