"""The one door from Hydra to typed configs: `@command(Schema, config_name=...)` makes a module runnable.

Hydra composes plain mappings over the schema's defaults (so an unknown key is refused while composing); `from_mapping`
turns the result into frozen dataclasses and checks every type. Past this door no DictConfig is seen. A `ConfigError`
anywhere inside a command ends it with one line on stderr and exit status 2.
"""

import difflib
import functools
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from configs.schema import AttentionConfig, ConfigError, RopeConfig, RunConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
CONFIG_DIR = Path(__file__).parent
REPOSITORY = CONFIG_DIR.parent
# Keys of the composed mapping that stages refer to as ${attention} and ${rope}; they are not fields of the run itself.
_SHARED: dict[type, dict[str, type]] = {RunConfig: {"attention": AttentionConfig, "rope": RopeConfig}}


def to_mapping(config: object) -> Any:
    """Plain dicts, lists and scalars of a config dataclass; the inverse of `from_mapping`."""
    if is_dataclass(config):
        return {item.name: to_mapping(getattr(config, item.name)) for item in fields(config)}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, tuple):
        return [to_mapping(item) for item in config]
    return config


def from_mapping(schema: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """A `schema` dataclass from plain values. Raises ConfigError naming the full key, the value and what is accepted."""
    hints = typing.get_type_hints(schema)
    known = [item.name for item in fields(schema)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}{key}: no such key{_nearest(str(key), known)}; accepted: {', '.join(known)}")
    arguments = {key: _convert(hints[key], value, f"{path}{key}") for key, value in values.items()}
    try:
        return schema(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r}: must be a mapping with keys {', '.join(item.name for item in fields(hint))}")
        return from_mapping(hint, value, f"{key}.")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{key}={value!r}: must be a list")
        return tuple(_convert(typing.get_args(hint)[0], item, f"{key}.{index}") for index, item in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, Enum):
        accepted = [member.value for member in hint]
        if value not in accepted:
            raise ConfigError(f"{key}={value!r}: no such choice{_nearest(str(value), accepted)}; accepted: {', '.join(accepted)}")
        return hint(value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)  # 1e6 is how people write a token budget, and YAML reads it as a float
    if type(value) is not hint:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
        raise ConfigError(f"{key}={value!r}: must be {names[hint]}")
    return value


def to_run(schema: type[T], config: DictConfig) -> T:
    """A composed Hydra config as `schema`; `???` left in it is an error that names the key."""
    missing = sorted(key for key in OmegaConf.missing_keys(config) if not key.startswith("hydra"))
    if missing:
        key = re.sub(r"\[(\d+)\]", r".\1", missing[0])  # brackets would need quotes in a shell
        raise ConfigError(f"{key}: must be given; add {key}=VALUE")
    values = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    for key, shared in _SHARED.get(schema, {}).items():
        from_mapping(shared, values.pop(key), f"{key}.")
    return from_mapping(schema, values)


def _defaults(schema: type) -> dict[str, Any]:
    values = {key: _defaults(shared) for key, shared in _SHARED.get(schema, {}).items()}
    for item in fields(schema):
        nested = typing.get_type_hints(schema)[item.name]
        if isinstance(nested, type) and is_dataclass(nested):
            values[item.name] = _defaults(nested)
        else:
            values[item.name] = to_mapping(item.default_factory() if item.default_factory is not MISSING else item.default)
    return values


def _keys(schema: type, prefix: str = "") -> list[str]:
    """Every key under `schema`, dotted; items of a list stand under `.0`."""
    keys = [key for name, shared in _SHARED.get(schema, {}).items() for key in _keys(shared, f"{name}.")]
    for name, hint in typing.get_type_hints(schema).items():
        keys.append(f"{prefix}{name}")
        if typing.get_origin(hint) is tuple and is_dataclass(typing.get_args(hint)[0]):
            keys += _keys(typing.get_args(hint)[0], f"{prefix}{name}.0.")
        elif isinstance(hint, type) and is_dataclass(hint):
            keys += _keys(hint, f"{prefix}{name}.")
    return keys


def _nearest(word: str, accepted: Sequence[str]) -> str:
    """`, did you mean 'x'?`, or nothing where no accepted word is near."""
    near = difflib.get_close_matches(word, accepted, n=1, cutoff=0.5)
    if not near:  # a right name under a wrong parent: compare the last parts
        last = {key.split(".")[-1]: key for key in reversed(accepted)}
        near = [last[name] for name in difflib.get_close_matches(word.split(".")[-1], list(last), n=1, cutoff=0.75)]
    return f", did you mean '{near[0]}'?" if near else ""


def _explain(error: Exception, schema: type) -> str:
    """One line for a mistake that Hydra or OmegaConf found while composing."""
    accepted = _keys(schema)
    if isinstance(error, yaml.YAMLError):
        return "a config file is not YAML: " + " ".join(str(error).split())
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, name = str(cause.missing_cfg_file).rpartition("/")
            options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
            return f"{group}={name}: no such config{_nearest(name, options)}; accepted: {', '.join(options)}"
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
            key = cause.full_key or str(cause.key)
            override = re.search(r"Could not override '([^']+)'", str(error))
            key = override.group(1) if override else key
            return f"{key}: no such key{_nearest(key, accepted)}"
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as key=value ({lines[0]}); quote values with brackets or commas: 'key=\"...\"'"
    foreign = re.search(r"Could not override '([^']+)'.*No match in the defaults list", lines[0])
    if foreign:
        return f"{foreign.group(1)}: no such key in this command{_nearest(foreign.group(1), accepted)}"
    hint = "; quote a value that holds commas: 'key=\"a, b\"'" if lines[0].startswith("Ambiguous value") else ""
    return f"{lines[0]}{hint}" if error.__cause__ is None else f"{lines[0]}: {' '.join(str(error.__cause__).split())}"


def command(schema: type[T], *, config_name: str) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Turns `main(config)` into a program configured by `configs/CONFIG_NAME.yaml` and `key=value` arguments.

    User mistakes (ConfigError and whatever Hydra refuses) end in one line on stderr and exit status 2.
    """

    def decorate(main: Callable[[T], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            os.chdir(REPOSITORY)  # relative paths in a config mean the same from wherever it is started
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing several lines
            ConfigStore.instance().store(name=f"{config_name}_schema", node=_defaults(schema))

            composed: list[DictConfig] = []
            try:
                hydra.main(config_path=str(CONFIG_DIR), config_name=config_name, version_base="1.3")(composed.append)()
                for config in composed:  # none for --help; the work runs outside Hydra, which would wrap its errors
                    main(to_run(schema, config))
            except ConfigError as error:
                fail(str(error))
            except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
                fail(_explain(error, schema))

        return run

    return decorate


def compose(schema: type[T], *, config_name: str, overrides: Sequence[str] = ()) -> T:
    """The config a command line would give, for tests and for programs that start runs. Raises ConfigError."""
    ConfigStore.instance().store(name=f"{config_name}_schema", node=_defaults(schema))
    try:
        with hydra.initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            return to_run(schema, hydra.compose(config_name=config_name, overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_explain(error, schema)) from None


def fail(message: str) -> typing.NoReturn:
    """Ends the program as a user's mistake: the message on one line of stderr, exit status 2."""
    if os.environ.get("RANK", "0") == "0":  # every rank of a launch finds the same mistake
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(2)
