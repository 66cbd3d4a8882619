"""One job, in whichever process a launcher gives it: wait for a place, train, and put the row into the results."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from configs.registry import REPOSITORY
from configs.schema import ConfigError, Device, SweepConfig, SweepLauncher
from scripts.launching import deepspeed_command, lock_log, trainer, why_it_ended
from scripts.sweeps.jobs import Job, make_trial, trial_label
from scripts.sweeps.results import FILE, add, collect, read
from train.run_dir import describe_launch, is_trained, write_atomically

_POLL_SECONDS = 0.2


def log_file(config: SweepConfig, job: str) -> Path:
    """All that the trainer of a job says; locked while it lives."""
    return Path(config.sweep_dir) / f"{job}.log"


def error_file(config: SweepConfig, job: str) -> Path:
    """One line, why the job failed when it was last tried; absent otherwise."""
    return Path(config.sweep_dir) / f"{job}.error"


def trials_file(config: SweepConfig) -> Path:
    """The names of the jobs that the search has chosen since it was started, a line each; some twice."""
    return Path(config.sweep_dir) / ".trials"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a launcher calls with the texts of its values: a job's number, or what optuna chose for each key of `space`."""

    config: SweepConfig
    jobs: Sequence[Job] = ()
    space: Sequence[str] = ()

    def __call__(self, values: list[str]) -> float:
        """The held-out loss of the job; infinite where it failed, which is told in `error_file` and stops no other job."""
        os.chdir(REPOSITORY)
        name = trial_label(self.space, values) if self.space else self.jobs[int(values[0])].name
        try:
            job = make_trial(self.config, self.space, values) if self.space else self.jobs[int(values[0])]
            name = job.name
            self._note(name)
            error_file(self.config, name).unlink(missing_ok=True)
            return run_job(self.config, job)
        except (ConfigError, OSError) as failure:
            self._note(name)
            write_atomically(error_file(self.config, name), f"{failure}\n")
            return float("inf")

    def _note(self, name: str) -> None:
        if self.space:
            with trials_file(self.config).open("a") as file:
                file.write(f"{name}\n")


def run_job(config: SweepConfig, job: Job) -> float:
    """Trains a job as far as it is not yet, and returns its held-out loss. Raises ConfigError where training ends early."""
    results = Path(config.sweep_dir) / FILE
    done = next((row for row in read(results) if row["key"] == job.key), None)
    if done:
        return float(done["heldout_loss"])
    # The trainer of a sweep that was killed may live on: it is waited for, and its work counts.
    log = lock_log(log_file(config, job.name), wait=True)
    assert log is not None
    with log:
        if not is_trained(job.run):
            with _place(config, job) as environment:
                _train(config, job, environment, log)
    row = collect(job, _device(job))
    add(results, row)
    return float(row["heldout_loss"])


def _train(config: SweepConfig, job: Job, environment: dict[str, str], log: IO[bytes]) -> None:
    on_gpu = "CUDA_VISIBLE_DEVICES" in environment
    command = deepspeed_command(job.overrides, num_ranks=None if on_gpu else config.gpus_per_job)
    path = log_file(config, job.name)
    with trainer(command, environment, path, log) as process:
        status = process.wait()
    if not is_trained(job.run):
        raise ConfigError(why_it_ended(path, status))


def _on_gpu(job: Job) -> bool:
    return job.run.device is not Device.CPU and torch.cuda.is_available()


def _device(job: Job) -> str:
    return torch.cuda.get_device_name() if _on_gpu(job) else str(describe_launch(world_size=1)["machine"])


@contextlib.contextmanager
def _place(config: SweepConfig, job: Job) -> Iterator[dict[str, str]]:
    """What the trainer finds in its environment: the GPUs of the first of `concurrent` places that is free, or its share of the cores.

    Place p has GPUs p·n, p·n + 1, … of those that this process sees, for n GPUs a job, counted on from the first after the last. A
    cluster gives each job GPUs of its own.
    """
    with contextlib.ExitStack() as held:
        place = 0
        if config.launcher is not SweepLauncher.SUBMITIT_SLURM:
            place = _take_place(config, held)
        if not _on_gpu(job):
            cores = max(1, len(os.sched_getaffinity(0)) // (config.concurrent * config.gpus_per_job))
            yield {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
            return
        yield {"CUDA_VISIBLE_DEVICES": ",".join(gpus_of_place(place, config.gpus_per_job, visible_gpus()))}


def _take_place(config: SweepConfig, held: contextlib.ExitStack) -> int:
    while True:
        for place in range(config.concurrent):
            lock = held.enter_context((Path(config.sweep_dir) / f".place{place}.lock").open("w"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return place
            lock.close()
        time.sleep(_POLL_SECONDS)


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def gpus_of_place(place: int, number: int, visible: Sequence[str]) -> list[str]:
    """The `number` GPUs of a place among `visible` ones. Raises ConfigError where there are fewer."""
    if number > len(visible):
        raise ConfigError(f"gpus_per_job={number}: this machine shows {len(visible)} GPUs")
    return [visible[(place * number + index) % len(visible)] for index in range(number)]
