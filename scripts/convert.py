"""Weights from and to Hugging Face: `python -m scripts.convert from_hf DIR OUT`, `python -m scripts.convert to_hf CKPT DIR`.

    from_hf DIR OUT    a downloaded Llama 2/3, Mistral, Qwen2/2.5 or Qwen3 (safetensors) to a folder that train.main init_from=OUT takes
    to_hf CKPT DIR     a checkpoint, a run's folder or such an OUT to a folder that transformers loads: a plain class where all layers are
                       full, else one with its source beside it (trust_remote_code=True)
    shard_bytes=N      size above which weights are written in several files

Tensors keep the dtype they have (a checkpoint's are fp32). The tokenizer, chat template and generation settings go along. The folder that
is made is whole or absent; one that is there already is left alone. Hub names are not taken: DIR lies on this machine.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from configs.mapping import nearest
from configs.model_file import MODEL_FILE, ModelFile, read_json
from configs.registry import REPOSITORY, command, fail, show
from configs.schema import ConfigError, ConvertConfig
from data.tokenizer import copy_tokenizer, load_tokenizer
from model.hf import MODELLING_FILE, TOKEN_IDS, from_config, is_computed, parameter_shapes, to_config, to_theirs
from scripts.program import quoted, run
from train.initial import Source, open_source
from train.run_dir import CHECKPOINTS, TOKENIZER, new_folder
from train.weights import WeightFolder, check_shapes, num_bytes, widest, write_weights

SUBCOMMANDS = ("from_hf", "to_hf")


def main() -> None:
    """Takes the subcommand and the two paths off the command line; the rest is their config."""
    words = [text for text in sys.argv[1:] if text.startswith(("/", ".")) or not ("=" in text or text.startswith("-"))]
    others = [text for text in sys.argv[1:] if text not in words]
    word = words[0] if words else ""
    if word in SUBCOMMANDS:
        sys.argv[1:] = others
        if not {"-h", "--help"} & set(others):
            if len(words) != 3:
                usage = {"from_hf": "DIR OUT", "to_hf": "CKPT DIR"}[word]
                fail(f"{word}: takes two paths and got {len(words) - 1}; python -m scripts.convert {word} {usage}")
            sys.argv[1:] = [f"source={quoted(words[1])}", f"target={quoted(words[2])}", *others]
    elif word or not {"-h", "--help"} & set(others):
        given = f"{word}: no such conversion{nearest(word, SUBCOMMANDS)}" if word else "what to do must be given"
        fail(f"{given}; accepted first word: {', '.join(SUBCOMMANDS)}")
    try:
        (to_hf if word == "to_hf" else from_hf)()
    except OSError as error:  # a path that may not be looked at, or is too long for the system
        fail(f"{error.filename}: {error.strerror}")


@command(ConvertConfig, config_name="convert")
def from_hf(config: ConvertConfig) -> None:
    """Converts a Hugging Face folder and says what became of it."""
    source, target = Path(config.source), Path(config.target)
    if source.resolve() in target.resolve().parents:
        raise ConfigError(f"OUT={target}: lies in DIR={source}, which is left as it is; choose a folder outside")
    described = from_config_file(source)
    shapes = parameter_shapes(described.model)
    weights = WeightFolder(source)
    stored = {name: shape for name, shape in weights.shapes.items() if not is_computed(name)}
    if not described.model.tie_embeddings and "lm_head.weight" not in stored:
        said = "lm_head.weight is missing, and config.json has tie_word_embeddings=False or nothing"
        raise ConfigError(f"{source}: {said}; set it to true where the head is the embedding, else fetch the files again")
    if described.model.tie_embeddings and "lm_head.weight" in stored:
        if not torch.equal(weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight")):
            said = "lm_head.weight is not model.embed_tokens.weight, though config.json has tie_word_embeddings=True"
            raise ConfigError(f"{source}: {said}; set it to false where the head is a matrix of its own, else fetch the files again")
        del stored["lm_head.weight"]
    names = {name: to_theirs(name) for name in shapes}
    check_shapes(stored, {names[name]: shape for name, shape in shapes.items()}, where=source, said_by="config.json")
    sizes = {name: num_bytes(stored[theirs], weights.dtypes[theirs]) for name, theirs in names.items()}
    with new_folder(target, "OUT") as folder:
        write_weights(folder, sizes, lambda name: weights.read(names[name]), max_shard_bytes=config.shard_bytes)
        (folder / MODEL_FILE).write_text(described.text())
        copied = copy_tokenizer(source, folder)
        if "generation_config.json" not in copied:
            _write_json(folder / "generation_config.json", _token_ids(read_json(source / "config.json")))
    tokenizer = f"tokenizer: {', '.join(copied)}" if copied else f"{source} has no tokenizer: a corpus cannot be checked against it"
    show("\n".join([_summary(config.target, sizes, weights.dtypes), *_describe(described), tokenizer]))


@command(ConvertConfig, config_name="convert")
def to_hf(config: ConvertConfig) -> None:
    """Exports a checkpoint or a converted folder and says what became of it."""
    source = open_source(config.source)
    names = {name: to_theirs(name) for name in parameter_shapes(source.described.model)}
    sizes = {theirs: num_bytes(source.shapes[name], source.dtypes[name]) for name, theirs in names.items()}
    ours = {theirs: name for name, theirs in names.items()}
    with new_folder(Path(config.target), "DIR") as folder:
        token_ids = _place_tokenizer(source, folder)
        described = to_config(source.described, dtype=widest(source.dtypes), token_ids=token_ids)
        write_weights(folder, sizes, lambda theirs: source.read(ours[theirs]), max_shard_bytes=config.shard_bytes)
        _write_json(folder / "config.json", described)
        if "auto_map" in described:
            shutil.copyfile(REPOSITORY / "model" / "hf_moba.py", folder / MODELLING_FILE)
    loads = "AutoModelForCausalLM.from_pretrained(DIR" + (", trust_remote_code=True)" if "auto_map" in described else ")")
    show("\n".join([_summary(config.target, sizes, source.dtypes), f"{described['architectures'][0]}: {loads}"]))


def from_config_file(source: Path) -> ModelFile:
    """The model that the config.json in `source` describes. Raises ConfigError naming the file."""
    path = source / "config.json"
    if not source.is_dir():
        raise ConfigError(f"DIR={source}: is no folder here; hub names are not taken, download it first")
    ours = any((source / name).exists() for name in (MODEL_FILE, CHECKPOINTS, "state.json"))
    if ours and not (path.is_file() and "model_type" in read_json(path)):  # a run keeps its own settings under that name
        raise ConfigError(f"DIR={source}: is a folder of this program; init_from={source} takes it as it is, to_hf exports it")
    values = read_json(path)
    try:
        return from_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _place_tokenizer(source: Source, folder: Path) -> dict[str, Any]:
    """Copies the tokenizer, completes what transformers needs to read it, and returns the ids of its separators."""
    if source.tokenizer is None and source.tokenizer_hashes:
        raise ConfigError(
            f"{source.folder}: its tokenizer {source.tokenizer_hashes[0]} is neither in the run's folder nor in its corpus; "
            f"put it into {source.folder.parent.parent / TOKENIZER}"
        )
    copied = copy_tokenizer(source.tokenizer or source.folder, folder)
    generation = folder / "generation_config.json"
    if source.tokenizer:
        tokenizer = load_tokenizer(folder)
        if "tokenizer_config.json" not in copied:
            _write_json(folder / "tokenizer_config.json", tokenizer.settings())
        if "generation_config.json" not in copied:
            _write_json(generation, {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id})
    return _token_ids(read_json(generation)) if generation.is_file() else {}


def _token_ids(values: dict[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in TOKEN_IDS if values.get(key) is not None}


def _describe(described: ModelFile) -> list[str]:
    model, rope = described.model, described.rope
    return [
        f"{model.num_layers} layers of {model.hidden_size}, {model.num_heads} heads over {model.num_kv_heads} of {model.head_dim}, "
        f"vocabulary {model.vocab_size:,}, attention: {described.attention.rule}",
        f"{model.max_seq_len:,} positions, rope theta {rope.theta:,.0f}, scaling {rope.scaling.value}",
    ]


def _summary(target: str, sizes: dict[str, int], dtypes: dict[str, str]) -> str:
    return f"{target}: {len(sizes)} tensors, {sum(sizes.values()) / 1e9:,.3f} GB, {' and '.join(sorted(set(dtypes.values())))}"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    run(main, interrupted="nothing was kept")
