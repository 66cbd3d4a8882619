"""The one door from Hydra to typed configs: `@command(Schema, config_name=...)` makes a module runnable.

Hydra composes plain mappings over the schema's defaults (so an unknown key is refused while composing); overrides of list
items (`stages.0.tokens=…`), which Hydra allows only for keys that the file spells out, are applied after it; `from_mapping`
turns the result into frozen dataclasses and checks every type. Past this door no DictConfig is seen. A `ConfigError`
anywhere inside a command ends it with one line on stderr and exit status 2.
"""

import contextlib
import functools
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from configs.mapping import from_mapping, nearest, to_mapping
from configs.schema import AttentionConfig, ConfigError, RopeConfig, RunConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
CONFIG_DIR = Path(__file__).parent
REPOSITORY = CONFIG_DIR.parent
# Keys of the composed mapping that hold for every stage, which may change parts of them; they are not fields of the run itself.
_SHARED: dict[type, dict[str, type]] = {RunConfig: {"attention": AttentionConfig, "rope": RopeConfig}}
_ITEM = re.compile(r"^(\+\+)?(?P<key>(\w+\.)+\d+(\.\w+)*)=")


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
            return f"{group}={name}: no such config{nearest(name, options)}; accepted: {', '.join(options)}"
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
            key = cause.full_key or str(cause.key)
            override = re.search(r"Could not override '([^']+)'", str(error))
            file = re.match(r"In '([^']+)'", str(error))
            key = override.group(1) if override else key
            return f"{key}: no such key{nearest(key, accepted)}{f' (in configs/{file.group(1)}.yaml)' if file else ''}"
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as key=value ({lines[0]}); quote values with brackets or commas: 'key=\"...\"'"
    foreign = re.search(r"Could not override '([^']+)'.*No match in the defaults list", lines[0])
    if foreign:
        return f"{foreign.group(1)}: no such key in this command{nearest(foreign.group(1), accepted)}"
    hint = "; quote a value that holds commas: 'key=\"a, b\"'" if lines[0].startswith("Ambiguous value") else ""
    return f"{lines[0]}{hint}" if error.__cause__ is None else f"{lines[0]}: {' '.join(str(error.__cause__).split())}"


def _compose(schema: type, config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed mapping, without what `_SHARED` holds for the stages: they have it. Raises ConfigError."""
    items = [text for text in overrides if _ITEM.match(text)]
    plain = [text for text in overrides if not _ITEM.match(text)]
    for text in plain:
        _check_choice(*text.partition("=")[::2])
    ConfigStore.instance().store(name=f"{config_name}_schema", node=_defaults(schema))
    try:
        with hydra.initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            config = hydra.compose(config_name=config_name, overrides=plain)
        missing = sorted(re.sub(r"\[(\d+)\]", r".\1", key) for key in OmegaConf.missing_keys(config))
        for key in missing:
            raise ConfigError(f"{key}: must be given; add {key}=VALUE")
        values = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        for key, shared in _SHARED.get(schema, {}).items():
            common = values.pop(key)
            from_mapping(shared, common, f"{key}.")
            for stage in values["stages"]:
                if isinstance(stage, dict) and isinstance(stage.setdefault(key, {}), dict):
                    stage[key] = common | stage[key]
        for text in items:
            override = OverridesParser.create().parse_override(text)
            _set_item(values, override.key_or_group, override.value())
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_explain(error, schema)) from None
    return values


def _check_choice(key: str, value: str) -> None:
    """Raises ConfigError where a group of configs is given what cannot be a file's name, which Hydra would take for none."""
    options = sorted(path.stem for path in (CONFIG_DIR / key).glob("*.yaml")) if re.fullmatch(r"\w+", key) else []
    named = re.fullmatch(r"[\w/.-]+", value) and value != "null"
    if options and not named and (key, value) != ("experiment", "null"):
        hint = f"; a list's items are set as {key}.0.KEY=VALUE" if value.startswith("[") else ""
        raise ConfigError(f"{key}={value}: must be the name of a config; accepted: {', '.join(options)}{hint}")


def _set_item(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    here: Any = values
    for depth, part in enumerate([*parents, last]):
        path = ".".join(key.split(".")[:depth])
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise ConfigError(f"{key}: no such item; {path} has {len(here)}, counted from 0")
        elif not isinstance(here, dict):
            raise ConfigError(f"{key}: no such key, {path} is {here!r}")
        if depth == len(parents):
            here[int(part) if isinstance(here, list) else part] = value
        else:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})


def compose(schema: type[T], *, config_name: str, overrides: Sequence[str] = ()) -> T:
    """The config of a command line: `configs/CONFIG_NAME.yaml` under `key=value` overrides. Raises ConfigError."""
    return from_mapping(schema, _compose(schema, config_name, overrides))


def command(schema: type[T], *, config_name: str) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Turns `main(config)` into a program configured by `configs/CONFIG_NAME.yaml` and `key=value` arguments.

    `--help` shows every key, `--cfg` the config that the arguments make. User mistakes (ConfigError and whatever Hydra refuses)
    end in one line on stderr and exit status 2.
    """

    def decorate(main: Callable[[T], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            os.chdir(REPOSITORY)  # relative paths in a config mean the same from wherever it is started
            flags = [text for text in sys.argv[1:] if text.startswith("-")]
            overrides = [text for text in sys.argv[1:] if not text.startswith("-") and not ("--cfg" in flags and text == "job")]
            try:
                for flag in flags:
                    if not re.fullmatch(r"-h|--help|--cfg|--local_rank=\d+", flag):  # the launcher adds the last, unless told not to
                        raise ConfigError(f"{flag}: no such flag; accepted: --help, --cfg, and key=value")
                if {"-h", "--help"} & set(flags):
                    show(_help(main, config_name, _compose(schema, config_name, overrides)))
                elif "--cfg" in flags:
                    show(_yaml(to_mapping(compose(schema, config_name=config_name, overrides=overrides))))
                else:
                    main(compose(schema, config_name=config_name, overrides=overrides))
            except ConfigError as error:
                fail(str(error))

        return run

    return decorate


def _help(main: Callable[..., None], config_name: str, values: dict[str, Any]) -> str:
    root = yaml.safe_load((CONFIG_DIR / f"{config_name}.yaml").read_text())["defaults"]
    groups = [next(iter(entry)) for entry in root if isinstance(entry, dict)]
    options = [f"  {group}={'|'.join(sorted(path.stem for path in (CONFIG_DIR / group).glob('*.yaml')))}" for group in groups]
    about = (sys.modules[main.__module__].__doc__ or "").strip()
    return "\n".join([about, "", "Set as key=value; --cfg shows the result. Whole configs:", *options, "", "Every key:", _yaml(values)])


def _yaml(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120).rstrip()


def show(text: str) -> None:
    """Prints the result of a command whose work is done. A reader that has left (`| head`) is no mistake; a full disk is one."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer would fail once more at exit
        if not isinstance(error, BrokenPipeError):
            fail(f"standard output: {error.strerror}; the work itself is done")


def fail(message: str) -> typing.NoReturn:
    """Ends the program as a user's mistake: the message on one line of stderr, exit status 2."""
    if os.environ.get("RANK", "0") == "0":  # every rank of a launch finds the same mistake
        with contextlib.suppress(OSError):  # nobody is left to read it
            print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(2)
