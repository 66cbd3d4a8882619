"""Many trainings from one command: `python -m scripts.sweep sweep=NAME key=value ...`, NAME one of configs/sweep/.

    --dry-run                              print the jobs with FLOPs, tokens, memory and time, and start none
    seed=0,1 optim.lr=1e-3,2e-3            any key of train.main; of several values, every one makes jobs of its own
    concurrent=2 gpus_per_job=1            jobs at a time, and GPUs of each
    trials=20 'optim.lr=tag(log, interval(1e-4, 1e-2))'         let optuna choose the values
    launcher=submitit_slurm hydra.launcher.partition=gpu        or let a cluster run the jobs

A Hydra multirun that starts one deepspeed launch a job. Results go to results.csv in the sweep's folder. Started again, it goes on where
it stopped: jobs that results.csv has are skipped, wherever they were trained; interrupted ones resume. A job that fails stops no other;
the command then ends with status 1 and names it.
"""

import sys
from dataclasses import fields
from pathlib import Path

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.registry import check_key, command, compose, fail, show
from configs.schema import ConfigError, RunConfig, SweepConfig
from scripts.program import quoted, run
from scripts.sweeps.costs import markdown
from scripts.sweeps.jobs import check_corpora, first_trial, key_of, make_jobs, search_space
from scripts.sweeps.multirun import multirun
from scripts.sweeps.results import FILE, read
from scripts.sweeps.table import JobTable
from scripts.sweeps.task import Task, error_file, log_file, trials_file

_OWN = {"sweep", *(item.name for item in fields(SweepConfig))}


def main() -> None:
    """Gives the sweep its own keys, and the jobs the others."""
    words = ["dry_run=true" if text == "--dry-run" else text for text in sys.argv[1:]]
    own = [text for text in words if text.startswith("-") or text == "job" or text.partition("=")[0] in _OWN]
    others = [text for text in words if text not in own]
    of_hydra = [text for text in others if text.startswith(("hydra.", "hydra/"))]
    of_jobs = [text for text in others if text not in of_hydra]
    try:
        for text in of_jobs:
            check_key(RunConfig, "train", key_of(text), sorted(_OWN))
        _check_given_once([text for text in own if key_of(text) == "grids"], of_jobs)
    except ConfigError as error:
        fail(str(error))
    lists = {"hydra_settings": of_hydra, "overrides": of_jobs}
    sys.argv[1:] = [*own, *(f"{key}=[{','.join(map(quoted, texts))}]" for key, texts in lists.items() if texts)]
    sweep()


def _check_given_once(grids: list[str], overrides: list[str]) -> None:
    """Raises ConfigError for one of `overrides` whose key `grids=` of the same command line sets too: an arm would lose what it is."""
    found = compose(SweepConfig, config_name="sweep", overrides=["sweep_dir=.", *grids]).grids
    for text in overrides:
        other = next((each for grid in found for each in grid if key_of(each) == key_of(text)), None)
        if other is not None:
            raise ConfigError(f"{text}: grids of the same command line sets {key_of(text)} too, {other}; give it in one of the two")


@command(SweepConfig, config_name="sweep")
def sweep(config: SweepConfig) -> None:
    """Runs what is not done yet. Every job is checked before the first one starts."""
    space = search_space(config) if config.trials else {}
    jobs = [first_trial(config, space)] if space else make_jobs(config)
    folder = Path(config.sweep_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"sweep_dir={folder}: is a file; a sweep needs a folder")
    results = folder / FILE
    done = {row["key"] for row in read(results)}
    if config.dry_run:
        choices = ", ".join(f"{key}={text}" for key, text in space.items())
        search = f"\n\nA search of {config.trials} such jobs, with {choices}; this one has the first value of each."
        show(markdown(config, jobs, done) + (search if space else ""))
        return
    left = [job for job in jobs if job.key not in done]
    check_corpora(left)
    for job in left:
        error_file(config, job.name).unlink(missing_ok=True)
    with JobTable(config, [] if space else jobs) as table:
        if space:
            folder.mkdir(parents=True, exist_ok=True)
            trials_file(config).unlink(missing_ok=True)
            multirun(config, Task(config=config, space=tuple(space)), list(space.values()))
        elif left:
            multirun(config, Task(config=config, jobs=left), [",".join(map(str, range(len(left))))])
        states = table.states()
    failed = {name: state.error or f"did not end, see {log_file(config, name)}" for name, state in states.items() if state.status != "done"}
    if failed:
        _end(config, failed, len(states))
    show("\n".join([f"{len(states)} jobs done", str(results)]))


def _end(config: SweepConfig, failed: dict[str, str], number: int) -> None:
    lines = [f"{name}: {error}" for name, error in failed.items()]
    print("\n".join([f"{len(failed)} of {number} jobs failed:", *lines]), file=sys.stderr, flush=True)
    raise SystemExit(1)


if __name__ == "__main__":
    run(main, interrupted="run it again to go on")
