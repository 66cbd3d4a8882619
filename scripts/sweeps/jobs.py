"""The jobs of a sweep: checked training runs, their names, and the key by which a run is known on any machine."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.checks import check_run, check_vocabulary
from configs.mapping import to_mapping
from configs.registry import compose
from configs.schema import ConfigError, RunConfig, SweepConfig
from data.shards import Corpus
from scripts.program import quoted
from scripts.sweeps.multirun import combinations, first_value, is_interval, searched
from train.run_dir import IDENTITY
from train.trainer import check_heldout, check_mixes

# The sweep sets these itself.
_OURS = ("name", "run_dir", "resume", "logging.progress")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run of a sweep."""

    name: str
    """What sets it apart from the other jobs, and the beginning of its key: its folder in the sweep's, and its log."""
    key: str
    """Hash of all that its result depends on: the same on another machine, where the corpus may lie elsewhere."""
    overrides: tuple[str, ...]
    """key=value of train.main."""
    run: RunConfig

    @property
    def model(self) -> str:
        """The file in configs/model that it takes; empty where an experiment chooses."""
        return next((text.partition("=")[2] for text in reversed(self.overrides) if text.startswith("model=")), "")


def make_jobs(config: SweepConfig) -> list[Job]:
    """The jobs of a sweep without a search, each composed and checked as training would. Raises ConfigError for the first mistake."""
    return _make(config, [settings for grid in _grids(config) for settings in combinations(grid)])


def search_space(config: SweepConfig) -> dict[str, str]:
    """What optuna gives values to, by key. Raises ConfigError where a search has nothing to choose, or other trouble can be foreseen."""
    grids = _grids(config)
    if len(grids) > 1:
        raise ConfigError(f"trials={config.trials}: a search takes one list of settings, grids has {len(grids)}")
    space = searched(grids[0])
    if not space:
        raise ConfigError(f"trials={config.trials}: no setting has values to choose from; give one as key=interval(low, high)")
    return space


def make_trial(config: SweepConfig, space: Sequence[str], values: Sequence[str]) -> Job:
    """The job of a search that has `values` for the keys of `space`. Raises ConfigError."""
    given = [f"{key}={value}" for key, value in zip(space, values, strict=True)]
    (job,) = _make(config, combinations([*_grids(config)[0], *given]), label=trial_label(space, values))
    return job


def trial_label(space: Sequence[str], values: Sequence[str]) -> str:
    """The name of a trial without its key: what it has chosen."""
    return "-".join(_word(f"{key}={value}") for key, value in zip(space, values, strict=True))


def first_trial(config: SweepConfig, space: Mapping[str, str]) -> Job:
    """A trial with the first of the values that each key may have, to be checked before the search begins. Raises ConfigError."""
    return make_trial(config, list(space), [first_value(f"{key}={text}") for key, text in space.items()])


def key_of(setting: str) -> str:
    """The key of key=value, without Hydra's signs before it."""
    return setting.partition("=")[0].lstrip("+~")


def _grids(config: SweepConfig) -> list[list[str]]:
    grids = [[*config.settings, *grid, *config.overrides] for grid in config.grids]
    for text in dict.fromkeys(text for grid in grids for text in grid):
        key = key_of(text)
        if key in _OURS:
            raise ConfigError(f"{text}: a sweep sets {key} itself")
        if is_interval(text) and not config.trials:
            raise ConfigError(f"{text}: an interval has values for a search alone; add trials=N")
    return grids


def _make(config: SweepConfig, settings: Sequence[Sequence[str]], label: str | None = None) -> list[Job]:
    jobs: dict[str, Job] = {}
    labels = [label] if label is not None else _labels(settings)
    for short, overrides in zip(labels, settings, strict=True):
        try:
            run = compose(RunConfig, config_name="train", overrides=overrides)
            check_run(run, world_size=config.gpus_per_job)
        except ConfigError as error:
            raise ConfigError(f"job {short}: {error}") from None
        key = _key(run)
        if key in jobs:
            raise ConfigError(f"job {short}: is the same run as {jobs[key].name}; leave one out")
        name = f"{short}-{key[:6]}"
        folder = str(Path(config.sweep_dir) / name)
        ours = (f"name={quoted(name)}", f"run_dir={quoted(folder)}", "logging.progress=false")
        jobs[key] = Job(name=name, key=key, overrides=(*overrides, *ours), run=replace(run, name=name, run_dir=folder))
    return list(jobs.values())


def _key(run: RunConfig) -> str:
    values = to_mapping(run)
    decides = {key: values[key] for key in (*IDENTITY, "max_steps", "evaluation", "data")} | {"precision": values["parallel"]["precision"]}
    for place in (decides["data"], *decides["data"]["sources"]):
        for key in ("prepared_dir", "num_workers", "path"):
            place.pop(key, None)
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=8).hexdigest()


def _labels(settings: Sequence[Sequence[str]]) -> list[str]:
    """The fewest settings that tell the jobs apart, in the order in which they are given."""
    jobs = [dict(text.partition("=")[::2] for text in job) for job in settings]
    chosen: list[str] = []
    for key in dict.fromkeys(key for job in jobs for key in job):
        if len({_values(job, [*chosen, key]) for job in jobs}) > len({_values(job, chosen) for job in jobs}):
            chosen.append(key)
    return ["-".join(_word(f"{key}={job[key]}") for key in chosen if key in job) or "run" for job in jobs]


def _values(job: dict[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(job.get(key) for key in keys)


def _word(setting: str) -> str:
    """A setting as a part of a file's name: its value, and before a number the last part of the key."""
    key, _, value = setting.partition("=")
    last = key.rpartition(".")[2] if re.match(r"[-+.\d]", value) else ""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", f"{last}{value}").strip("_")


def check_corpora(jobs: Sequence[Job]) -> None:
    """Raises ConfigError where a corpus that jobs read is not prepared, or does not have what training asks of it."""
    corpora = {folder: Corpus.open(folder, verify=False) for folder in dict.fromkeys(job.run.data.prepared_dir for job in jobs)}
    for job in jobs:
        folder = job.run.data.prepared_dir
        try:
            check_vocabulary(job.run, corpus=folder, vocab_size=corpora[folder].vocab_size)
            check_mixes(job.run, corpora[folder])
            check_heldout(job.run, corpora[folder])
        except ConfigError as error:
            raise ConfigError(f"job {job.name}: {error}") from None
