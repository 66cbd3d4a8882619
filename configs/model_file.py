"""What a folder of weights says of its model: `model.json` beside converted weights, `state.json` in a checkpoint.

A run that begins with `init_from` reads it before anything else, and keeps a copy in its own folder (`INIT_FILE`): to go on with the
run, the folder that it began with is needed no more.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.mapping import from_mapping, to_mapping
from configs.schema import AttentionConfig, ConfigError, ModelConfig, RopeConfig, RunConfig

MODEL_FILE = "model.json"
INIT_FILE = "init.json"
_STATE_FILE = "state.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model as it was trained last."""

    format: int = _FORMAT
    """Of this file."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shapes of the weights."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Positions."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention of each layer."""

    def text(self) -> str:
        """What the file holds."""
        return json.dumps(to_mapping(self), indent=2) + "\n"


def read_model_file(path: Path) -> ModelFile:
    """Raises ConfigError, `path` first, for a file that is missing, damaged or of another version."""
    values = read_json(path)
    if values.get("format") != _FORMAT:
        raise ConfigError(f"{path}: format {values.get('format')}, this version reads format {_FORMAT}")
    try:
        return from_mapping(ModelFile, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def describe(path: str) -> ModelFile:
    """The model in `path`: a converted folder, one of our checkpoints, or a run's folder (its latest checkpoint).

    Raises ConfigError, `path` first, where it is none of these.
    """
    folder = Path(path)
    if (folder / MODEL_FILE).is_file():
        return read_model_file(folder / MODEL_FILE)
    for checkpoints in (folder, folder / "checkpoints"):
        if (checkpoints / "latest").is_file():
            folder = checkpoints / (checkpoints / "latest").read_text().strip()
    if (folder / _STATE_FILE).is_file():
        return _of_checkpoint(folder / _STATE_FILE)
    if not folder.exists():
        raise ConfigError(f"{path}: no such folder")
    if (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json"):
        raise ConfigError(f"{path}: is a Hugging Face folder; `python -m scripts.convert from_hf {path} OUT` makes one that is taken")
    raise ConfigError(f"{path}: holds no converted model ({MODEL_FILE}), no checkpoint ({_STATE_FILE}) and no run")


def initial(run_dir: str, init_from: str, resume: str) -> ModelFile:
    """The model that `init_from` means: what lies there, else what this run, or the one whose checkpoint `resume` names, noted of it.

    Raises ConfigError where neither is to be had.
    """
    try:
        return describe(init_from)
    except ConfigError as error:
        for folder in (Path(run_dir), Path(resume), *Path(resume).parents[:2]):
            if (folder / INIT_FILE).is_file():
                noted = read_json(folder / INIT_FILE)
                if noted.pop("init_from", None) == init_from:
                    return from_mapping(ModelFile, noted)
        raise ConfigError(f"init_from={error}") from None


def note(folder: Path, init_from: str, described: ModelFile) -> None:
    """Writes `INIT_FILE`, which `initial` finds where `init_from` is gone. Raises OSError."""
    (folder / INIT_FILE).write_text(json.dumps({"init_from": init_from, **to_mapping(described)}, indent=2) + "\n")


# What a run may change of the model that it begins with; the rest is the shape and the meaning of the weights.
_CHANGEABLE = ("vocab_size", "max_seq_len", "init_std")


def check_kept(found: Mapping[str, Any], asked: Mapping[str, Any], init_from: str) -> None:
    """Raises ConfigError where a run asks for another model than the weights in `init_from` are, or for fewer words."""
    for key, value in found.items():
        if key not in _CHANGEABLE and asked[key] != value:
            raise ConfigError(f"model.{key}={asked[key]}: the weights in init_from={init_from} have {value}; leave model.{key} out")
    if type(asked["vocab_size"]) is int and asked["vocab_size"] < found["vocab_size"]:
        raise ConfigError(
            f"model.vocab_size={asked['vocab_size']}: the embedding in init_from={init_from} has {found['vocab_size']} rows; it may grow, "
            "not shrink"
        )


def lay_over(common: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """A mapping of settings under those of `part`. Of a RoPE under another form of scaling only the base is left."""
    if "scaling" in common and part.get("scaling", common["scaling"]) != common["scaling"]:
        common = {"theta": common["theta"]}
    return common | part


def _of_checkpoint(path: Path) -> ModelFile:
    state = read_json(path)
    try:
        run = from_mapping(RunConfig, state["config"])
        stage, last = run.stages[0], state["step"] - 1  # the last finished step
    except (ConfigError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is of another version of this program ({error})") from None
    for later in run.stages[1:]:
        last -= stage.steps
        if last < 0:
            break
        stage = later
    return ModelFile(model=run.model, rope=stage.rope, attention=stage.attention)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError, `path` first, where it cannot be read or is something else."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold an object, it holds a {type(values).__name__}")
    return values
