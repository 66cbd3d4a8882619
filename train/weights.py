"""Folders of safetensors files, sharded or not: read tensor by tensor, written shard by shard."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.model_file import read_json
from configs.schema import ConfigError
from model.transformer import Transformer

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
Shape = tuple[int, ...]
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class WeightFolder:
    """The tensors in `model.safetensors`, or in the shards that `model.safetensors.index.json` names.

    Opening reads the headers alone; `read` maps one shard at a time into memory and copies one tensor out of it.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError naming the file that is missing, damaged, or of a format that is not read."""
        self._folder = folder
        self._open: tuple[str, Any] | None = None
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        """As safetensors writes them: F32, BF16, F16."""
        listed = self._listed()
        for file in sorted(set(listed.values())) if listed else [WHOLE]:
            shard = self._shard(file)
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if listed and listed.get(name) != file:
                    said = f"holds {name}, which {INDEX} puts into {listed.get(name, 'no file')}"
                    raise ConfigError(f"{folder / file}: {said}; fetch the files again, they are not of one model")
                part = shard.get_slice(name)
                self._file_of[name], self.shapes[name], self.dtypes[name] = file, tuple(part.get_shape()), part.get_dtype()
                if self.dtypes[name] not in _DTYPES:
                    accepted = ", ".join(_DTYPES)
                    raise ConfigError(f"{folder / file}: {name} is {self.dtypes[name]}; accepted: {accepted}; save the model dequantised")
        for name, file in listed.items():
            if name not in self._file_of:
                raise ConfigError(f"{folder / file}: does not hold {name}, which {INDEX} puts there; fetch the file again")

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in the dtype it was stored in. Raises ConfigError where a value is NaN or infinite."""
        file = self._file_of[name]
        tensor = self._shard(file).get_tensor(name)
        if tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):  # NaN is both of them; no mask beside the tensor
            wrong = tensor.numel() - int(tensor.isfinite().sum())
            raise ConfigError(
                f"{self._folder / file}: {name} has {wrong:,} of {tensor.numel():,} values that are NaN or infinite; fetch the file again, "
                "or save the model from weights that are whole"
            )
        return tensor

    def _listed(self) -> dict[str, str]:
        """Tensor to file of the index; empty where there is one whole file instead."""
        if (self._folder / WHOLE).is_file():
            return {}
        index = self._folder / INDEX
        if not index.is_file():
            pickles = sorted(path.name for path in self._folder.glob("*.bin"))
            if pickles:
                raise ConfigError(
                    f"{self._folder / pickles[0]}: is a pickle, which may run any code when it is read; where you trust it, make "
                    "safetensors of it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
                )
            raise ConfigError(f"{self._folder}: holds neither {WHOLE} nor {INDEX}; fetch the weights")
        given = read_json(index).get("weight_map")
        listed: dict[str, str] = given if isinstance(given, dict) else {}
        wrong = [file for file in listed.values() if not (isinstance(file, str) and re.fullmatch(r"[^/\0\n]+\.safetensors", file))]
        if wrong or not listed:
            said = f", not to {wrong[0]!r}" if wrong else ""
            raise ConfigError(f"{index}: weight_map must map tensors to safetensors files of this folder{said}; fetch it again")
        return listed

    def _shard(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None  # the one before is unmapped first
            path = self._folder / file
            try:
                path.open("rb").close()  # safe_open has one reason for all refusals
                self._open = file, safe_open(path, framework="pt")
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error.strerror}); fetch the file") from None
            except SafetensorError as error:
                raise ConfigError(f"{path}: is damaged, or not a safetensors file ({error}); fetch it again") from None
        return self._open[1]


def num_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of a tensor; `dtype` as safetensors writes it."""
    return math.prod(shape) * _DTYPES[dtype].itemsize


def widest(dtypes: Mapping[str, str]) -> str:
    """The first of float64, float32, bfloat16 and float16 that a tensor has: what all can be read as."""
    return next(str(dtype).removeprefix("torch.") for name, dtype in _DTYPES.items() if name in dtypes.values())


def check_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape], *, where: Path, said_by: str) -> None:
    """Raises ConfigError naming the first tensor that is missing, unexpected or of another shape than `said_by` makes it."""
    for name, shape in wanted.items():
        if name not in found:
            raise ConfigError(
                f"{where}: {name} {list(shape)} is missing, {said_by} asks for it; fetch the files again, or correct {said_by}"
            )
        if found[name] != shape:
            shown = f"{name} has shape {list(found[name])}, {said_by} makes it {list(shape)}"
            raise ConfigError(f"{where}: {shown}; they do not belong together: fetch the files again, or correct {said_by}")
    for name, shape in found.items():
        if name not in wanted:
            shown = f"{name} {list(shape)} has no place in the model of {said_by}"
            raise ConfigError(f"{where}: {shown}; take it out of the files, or correct {said_by}")


def write_weights(folder: Path, names: Mapping[str, int], read: Callable[[str], Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the tensors `read(name)` of `names` (name to bytes) into one file, or into shards with an index where they are more than
    `max_shard_bytes`; memory of one shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, num_bytes in names.items():
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WHOLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        try:
            save_file({name: read(name).contiguous() for name in shard}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, among others
            raise ConfigError(f"{folder / file}: cannot be written ({error}); nothing was kept") from None
        placed |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(names.values())}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def fill(model: Transformer, shapes: Mapping[str, Shape], read: Callable[[str], Tensor]) -> None:
    """Copies every parameter from `read(name)`, tensor by tensor, into the model's dtype and device.

    Where the model has more words than the weights, a new word's row is the mean of the old rows, in the embedding and in the head:
    it starts as the average word. `shapes` must be those of the model but for that.
    """
    for name, parameter in model.named_parameters():
        given = read(name)
        old = shapes[name][0]
        parameter[:old].copy_(given)
        if old < len(parameter):
            parameter[old:].copy_(given.float().mean(dim=0, keepdim=True).expand(len(parameter) - old, -1))
