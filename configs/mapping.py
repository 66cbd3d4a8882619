"""Config dataclasses to plain mappings and back, with every type checked on the way in."""

import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from configs.schema import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


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
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path.rstrip('.')}={values!r}: must be a mapping with keys {', '.join(item.name for item in fields(schema))}")
    hints = typing.get_type_hints(schema)
    known = [item.name for item in fields(schema)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}{key}: no such key{nearest(str(key), known, path)}; accepted: {', '.join(known)}")
    arguments = {key: _convert(hints[key], value, f"{path}{key}") for key, value in values.items()}
    try:
        return schema(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return from_mapping(hint, value, f"{key}.")
    if typing.get_origin(hint) is tuple:
        of = typing.get_args(hint)[0]
        if isinstance(value, (str, int, float)) and not is_dataclass(of):
            value = [value]  # contexts=512 is how people write a list of one
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{key}={value!r}: must be a list")
        return tuple(_convert(of, item, f"{key}.{index}") for index, item in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, Enum):
        accepted = [member.value for member in hint]
        if value not in accepted:
            raise ConfigError(f"{key}={value!r}: no such choice{nearest(str(value), accepted)}; accepted: {', '.join(accepted)}")
        return hint(value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{key}={value}: must be a finite number")
    if hint is int and type(value) is float and value.is_integer():
        return int(value)  # 1e6 is how people write a token budget, and YAML reads it as a float
    if hint is str and type(value) is int:
        return str(value)  # a text of digits, such as name=5, reads as a number; its own check says more of it than its type
    if type(value) is not hint:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
        raise ConfigError(f"{key}={value!r}: must be {names[hint]}")
    return value


def first_difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any] | None:
    """The dotted key, old and new value of the first leaf that differs between two mappings; None where nothing does."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(old.get(name), new.get(name), f"{key}.{name}") for name in sorted(old.keys() | new.keys())]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(*pair, f"{key}.{index}") for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else (key, old, new)
    return next((found for pair in pairs if (found := first_difference(*pair))), None)


def nearest(word: str, accepted: Sequence[str], prefix: str = "") -> str:
    """`, did you mean 'x'?`, or nothing where no accepted word is near."""
    near = difflib.get_close_matches(word, accepted, n=1, cutoff=0.5)
    if not near:  # a right name under a wrong parent: compare the last parts
        last = {key.split(".")[-1]: key for key in reversed(accepted)}
        near = [last[name] for name in difflib.get_close_matches(word.split(".")[-1], list(last), n=1, cutoff=0.75)]
    return f", did you mean '{prefix}{near[0]}'?" if near else ""
