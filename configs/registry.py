"""The one door from Hydra to typed configs: `@command(Schema, config_name=...)` makes a module runnable.

Hydra composes the chosen files over the schema's defaults (so an unknown key in one is refused); `key=value` settings, list
items among them (`stages.0.tokens=…`), are laid over the result; `from_mapping` turns it into frozen dataclasses and checks
every type. Past this door no DictConfig is seen. A `ConfigError` anywhere inside a command ends it with one line on stderr
and exit status 2.
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
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.mapping import from_mapping, nearest, to_mapping
from configs.model_file import check_kept, initial, lay_over
from configs.schema import (
    ActivationConfig,
    AttentionConfig,
    ConfigError,
    EvaluateConfig,
    MixConfig,
    PlanConfig,
    RopeConfig,
    RunConfig,
    SweepConfig,
    TrainBenchmarkConfig,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
CONFIG_DIR = Path(__file__).parent
REPOSITORY = CONFIG_DIR.parent
# Keys of the composed mapping that hold for every stage, which may change parts of them; they are not fields of the run itself.
_SHARED: dict[type, dict[str, type]] = {
    run: {"attention": AttentionConfig, "rope": RopeConfig, "activation": ActivationConfig, "mix": MixConfig}
    for run in (RunConfig, PlanConfig, TrainBenchmarkConfig)
}
# The programs whose keys are easily given to another one, with their config's root.
_PROGRAMS: dict[str, tuple[type, str]] = {
    "train.main": (RunConfig, "train"),
    "scripts.plan": (PlanConfig, "train"),
    "scripts.sweep": (SweepConfig, "sweep"),
    "scripts.evaluate": (EvaluateConfig, "evaluate"),
}


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
    """Every key under `schema`, dotted; an item of a list stands for all as `.0`."""
    keys = []
    for name, hint in {**_SHARED.get(schema, {}), **typing.get_type_hints(schema)}.items():
        key = f"{prefix}{name}"
        keys.append(key)
        if typing.get_origin(hint) is tuple:
            hint, key = typing.get_args(hint)[0], f"{key}.0"
            keys.append(key)
        if is_dataclass(hint):
            keys += _keys(typing.cast(type, hint), f"{key}.")
    return keys


def _groups(config_name: str) -> dict[str, str | None]:
    """The groups of whole configs that a root file chooses from, and the choice it makes."""
    entries = yaml.safe_load((CONFIG_DIR / f"{config_name}.yaml").read_text())["defaults"]
    return {group: chosen for entry in entries if isinstance(entry, dict) for group, chosen in entry.items()}


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _dotted(key: str) -> str:
    """`stages[0].tokens`, as OmegaConf writes it, the way it is set: brackets would need quotes in a shell."""
    return re.sub(r"\[(\d+)\]", r".\1", key)


def _explain(error: Exception, accepted: Sequence[str]) -> str:
    """One line for a mistake that Hydra or OmegaConf found in a config file or in what a value refers to."""
    if isinstance(error, yaml.YAMLError):
        return f"a config file is not YAML: {error}"
    found = re.match(
        r"(?:In '(?P<file>[^']*)': )?(?:\w+ raised while composing config:\s*)?(?P<what>.*)(?:\s*full_key: (?P<key>\S*))?", str(error)
    )
    assert found
    key, what = _dotted(found["key"] or ""), found["what"]
    if what.endswith("is not in struct"):
        what = f"no such key{nearest(key, accepted)}"
    where = f" (in configs/{found['file']}.yaml)" if found["file"] else ""
    return f"{key}: {what}{where}" if key else f"{what}{where}"


def _read(text: str) -> tuple[str, Any]:
    """Key and value of a `key=value` argument. Raises ConfigError."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{text}: cannot be read as key=value ({reason}); quote values with brackets or commas: 'key=\"...\"'") from None
    if not override.key_or_group or override.package is not None or override.is_delete():
        raise ConfigError(f"{text}: must be key=value")
    if override.is_sweep_override():
        raise ConfigError(f"{text}: is several values where a run takes one; quote a value that holds commas: 'key=\"a, b\"'")
    return override.key_or_group, override.value()


def _check_choice(group: str, value: Any, default: str | None) -> None:
    """Raises ConfigError where a group of configs has no such file."""
    options = _options(group)
    if str(value) in options or (value is None and default is None):
        return
    hint = f"; a list's items are set as {group}.0.KEY=VALUE" if isinstance(value, list) else ""
    value = "null" if value is None else value
    raise ConfigError(f"{group}={value}: no such config{nearest(str(value), options)}; accepted: {', '.join(options)}{hint}")


def check_key(schema: type, config_name: str, key: str, beside: Sequence[str] = ()) -> None:
    """Raises ConfigError, naming the nearest key or the program that has it, for one that is no setting, nor one of `beside`."""
    _check_key(key, [*_keys(schema), *_groups(config_name), *beside])


def _check_key(key: str, accepted: Sequence[str]) -> None:
    pattern = re.sub(r"\.\d+(?=\.|$)", ".0", key)
    if pattern in accepted:
        return
    siblings = [name for name in accepted if name.rpartition(".")[0] == pattern.rpartition(".")[0]]
    top = [name for name in accepted if "." not in name]
    is_misplaced = any(name.endswith(f".{pattern}") for name in accepted)
    elsewhere = "" if is_misplaced else _elsewhere(pattern)
    near = elsewhere or nearest(key, siblings) or nearest(key, accepted) or f"; accepted: {', '.join(siblings or top)}"
    raise ConfigError(f"{key}: no such key{near}")


def _elsewhere(key: str) -> str:
    """`; python -m PROGRAM has it`, or nothing where none of `_PROGRAMS` has such a key."""
    if re.match(r"hydra[./]", key):
        return "; settings of Hydra's launchers are taken by python -m scripts.sweep alone"
    having = (name for name, (schema, root) in _PROGRAMS.items() if key in _keys(schema) or key in _groups(root))
    return next((f"; python -m {name} has it" for name in having), "")


def _set(config: DictConfig, key: str, value: Any, accepted: Sequence[str]) -> None:
    """Sets a key of the composed config; a mapping changes the keys it names. Raises ConfigError for one that is not there."""
    _check_key(key, accepted)
    for item in re.finditer(r"\.(\d+)(?=\.|$)", key):
        owner = key[: item.start()]
        items = OmegaConf.select(config, owner)
        if not OmegaConf.is_list(items):
            raise ConfigError(f"{key}: no such item; {owner} is {items!r}")
        if int(item.group(1)) >= len(items):
            raise ConfigError(f"{key}: no such item; {owner} has {len(items)}, counted from 0")
    merge = isinstance(value, dict) and OmegaConf.is_dict(OmegaConf.select(config, key))
    OmegaConf.update(config, key, value, merge=merge, force_add=True)


def _compose(schema: type, config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed mapping, in which each stage has what `_SHARED` gives to all of them. Raises ConfigError.

    Hydra chooses the files. Settings are ours: its own reach an item of a list only where the file spells the key out.
    """
    arguments = [_read(text) for text in overrides]
    groups, accepted = _groups(config_name), _keys(schema)
    choices = {key: value for key, value in arguments if key in groups}
    for group, value in choices.items():
        _check_choice(group, value, groups[group])
    defaults = OmegaConf.create(_defaults(schema))
    OmegaConf.set_struct(defaults, True)  # so that Hydra refuses, naming the file, a key that is none
    ConfigStore.instance().store(name=f"{config_name}_schema", node=defaults)
    try:
        with hydra.initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            config = hydra.compose(
                config_name=config_name, overrides=[f"{group}={value}" for group, value in choices.items() if value is not None]
            )
        for key, value in arguments:
            if key not in groups:
                _set(config, key, value, accepted)
        missing = sorted(_dotted(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{missing[0]}: must be given; add {missing[0]}=VALUE")
        values = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(" ".join(_explain(error, accepted).split())) from None
    except (OSError, UnicodeError) as error:  # these say nothing of the file
        chosen = ", ".join([config_name, *(f"{group}={value}" for group, value in choices.items())])
        raise ConfigError(f"one of {chosen} cannot be read: {error}") from None
    if values.get("init_from"):
        _begin_from(schema, values, config_name, [key for key, _ in arguments])
    for key, shared in _SHARED.get(schema, {}).items():
        common = values.pop(key)
        from_mapping(shared, common, f"{key}.")
        for stage in values["stages"] if isinstance(values["stages"], list) else []:
            if isinstance(stage, dict) and isinstance(stage.setdefault(key, {}), dict):
                stage[key] = lay_over(common, stage[key])
    return values


def _begin_from(schema: type, values: dict[str, Any], config_name: str, keys: Sequence[str]) -> None:
    """Puts the model and rope of `init_from` under what the arguments and files say of them beyond the root file. Raises ConfigError.

    A plan may be made where the weights are not: it goes by the files alone.
    """
    with hydra.initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        plain = typing.cast(dict[str, Any], OmegaConf.to_container(hydra.compose(config_name=config_name), resolve=True))
    given = to_mapping(from_mapping(RunConfig, {key: values[key] for key in ("run_dir", "init_from", "resume")}))
    try:
        found = to_mapping(initial(given["run_dir"], given["init_from"], given["resume"]))
    except ConfigError:
        if schema is PlanConfig and not Path(given["init_from"]).exists():
            return
        raise
    for part in ("model", "rope"):
        chosen = {key: value for key, value in values[part].items() if value != plain[part].get(key) or {part, f"{part}.{key}"} & set(keys)}
        values[part] = lay_over(found[part], chosen) if part == "rope" else found[part] | chosen
    check_kept(found["model"], values["model"], given["init_from"])


def compose(schema: type[T], *, config_name: str, overrides: Sequence[str] = ()) -> T:
    """The config of a command line: `configs/CONFIG_NAME.yaml` under `key=value` overrides. Raises ConfigError."""
    return from_mapping(schema, _compose(schema, config_name, overrides))


def override(config: T, settings: Sequence[str]) -> T:
    """The config under further `key=value` settings; what holds for every stage is set in each. Raises ConfigError."""
    schema = type(config)
    values, accepted = OmegaConf.create(to_mapping(config)), _keys(schema)
    for key, value in map(_read, settings):
        shared = key.partition(".")[0] in _SHARED.get(schema, {})
        for place in [f"stages.{index}.{key}" for index in range(len(values.stages))] if shared else [key]:
            _set(values, place, value, accepted)
    return from_mapping(schema, typing.cast(dict[str, Any], OmegaConf.to_container(values)))


def command(schema: type[T], *, config_name: str) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Turns `main(config)` into a program configured by `configs/CONFIG_NAME.yaml` and `key=value` arguments.

    `--help` shows every key, `--cfg` the config that the arguments make. User mistakes (ConfigError and whatever Hydra refuses)
    end in one line on stderr and exit status 2.
    """

    def decorate(main: Callable[[T], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            for name in ("stdout", "stderr"):  # closed by whoever started us: the next file to be opened would take its place
                if getattr(sys, name) is None:
                    setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
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
    options = [f"  {group}={'|'.join(_options(group))}" for group in _groups(config_name)]
    about = (sys.modules[main.__module__].__doc__ or "").strip()
    whole = ["Whole configs:", *options, ""] if options else []
    return "\n".join([about, "", "Set as key=value; --cfg shows the result.", *whole, "Every key:", _yaml(values)])


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
