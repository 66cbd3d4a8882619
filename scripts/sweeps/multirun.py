"""Hydra's multirun: settings of several values become jobs, and Hydra's launchers and sweepers start them."""

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.mapping import nearest
from configs.registry import CONFIG_DIR
from configs.schema import ConfigError, SweepConfig, SweepLauncher
from scripts.program import quoted

_PLUGINS = {"joblib": "hydra-joblib-launcher", "submitit": "hydra-submitit-launcher", "optuna": "hydra-optuna-sweeper"}


def combinations(settings: Sequence[str]) -> list[list[str]]:
    """Every combination of the values of key=value settings, as settings of one value. Of a key that is set twice the last counts.

    Raises ConfigError for what cannot be read.
    """
    try:
        (jobs,) = BasicSweeper.split_arguments(list(_by_key(settings).values()), max_batch_size=None)
    except HydraException as error:
        raise ConfigError(f"{' '.join(settings)}: {_first_line(error)}") from None
    return jobs


def searched(settings: Sequence[str]) -> dict[str, str]:
    """The texts of the values that settings of several values have, for a search, by key. Raises ConfigError."""
    found = _by_key(settings)
    return {key: str(override.input_line).partition("=")[2] for key, override in found.items() if override.is_sweep_override()}


def _by_key(settings: Sequence[str]) -> dict[str, Override]:
    parsed = [_parse(text) for text in settings]
    return {override.get_key_element(): override for override in parsed}


def first_value(text: str) -> str:
    """Of the values that a setting of several has, the first; of an interval, its low end."""
    override = _parse(text)
    value = override.value()
    return str(value.start) if isinstance(value, IntervalSweep) else next(iter(override.sweep_string_iterator()))


def is_interval(text: str) -> bool:
    """Whether a setting is `interval(low, high)`, which only a search has values for. Raises ConfigError."""
    return _parse(text).is_interval_sweep()


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(f"{text}: cannot be read as key=value ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def multirun(config: SweepConfig, task: Callable[[list[str]], float], values: Sequence[str]) -> None:
    """Calls `task` in the launcher's processes, each time with one value for each of `values`, which are in Hydra's grammar: all
    combinations, or those that optuna's search for the smallest result tries.

    Raises ConfigError where Hydra refuses its settings, or a plugin is not installed.
    """

    def run(composed: object) -> float:
        return task([text.partition("=")[2] for text in HydraConfig.get().overrides.task])

    own = [f"+value{index}={value}" for index, value in enumerate(values)]
    try:
        with hydra.initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            application = GlobalHydra.instance().hydra
            assert application is not None
            GlobalHydra.instance().clear()  # tasks compose configs of their own
            application.multirun(config_name=None, task_function=run, overrides=[*own, *_settings(config)], with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        unknown = re.match(r"Could not override '([^']*)'", str(error))
        if unknown:
            raise ConfigError(f"{unknown[1]}: no such key{nearest(unknown[1], _hydra_keys(config))}") from None
        raise ConfigError(f"hydra: {' '.join(str(error).split())}") from None


def _hydra_keys(config: SweepConfig) -> list[str]:
    """`hydra.PART` and `hydra.PART.KEY`, with the plugins that a sweep takes."""
    with hydra.initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        parts = hydra.compose(return_hydra_config=True, overrides=_settings(replace(config, hydra_settings=()))).hydra
    keys = [(f"hydra.{name}", parts._get_node(name)) for name in parts]
    return [key for part, node in keys for key in (part, *(f"{part}.{name}" for name in (node if OmegaConf.is_dict(node) else ())))]


def _settings(config: SweepConfig) -> list[str]:
    """Which plugins Hydra takes and how they are set."""
    settings = [
        f"hydra.sweep.dir={quoted(str(Path(config.sweep_dir).absolute()))}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/hydra_logging=none",
        "hydra/job_logging=none",
    ]
    if config.launcher is not SweepLauncher.LOCAL:
        _require_plugin("submitit", f"launcher={config.launcher.value}")
        settings.append(f"hydra/launcher={config.launcher.value}")
    elif config.concurrent > 1:
        _require_plugin("joblib", f"concurrent={config.concurrent}")
        settings += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={config.concurrent}", "hydra.launcher.batch_size=1"]
    if config.launcher is SweepLauncher.SUBMITIT_SLURM:
        settings += [f"hydra.launcher.array_parallelism={config.concurrent}", f"hydra.launcher.gpus_per_node={config.gpus_per_job}"]
    if config.trials:
        _require_plugin("optuna", f"trials={config.trials}")
        settings += ["hydra/sweeper=optuna", "hydra/sweeper/sampler=tpe", "hydra.sweeper.sampler.seed=0"]
        settings += [f"hydra.sweeper.n_trials={config.trials}", f"hydra.sweeper.n_jobs={config.concurrent}"]
    return [*settings, *config.hydra_settings]


def _require_plugin(name: str, setting: str) -> None:
    kind = "sweeper" if name == "optuna" else "launcher"
    if importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(f"hydra_plugins.hydra_{name}_{kind}") is None:
        raise ConfigError(f"{setting}: needs the package {_PLUGINS[name]}; pip install {_PLUGINS[name]}")
