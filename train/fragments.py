"""Training state by the name of its parameter, in files that know nothing of ranks: what one layout has written, any other reads.

A file holds fragments of flattened parameters, fp32, under `PART/NAME@START`: elements START, START + 1, … of the weight, or of Adam's
moment `exp_avg` or `exp_avg_sq`, of parameter NAME. Its metadata gives the whole parameter's shape by name. All files together hold
every element.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, empty, float32

from configs.schema import ConfigError
from train.weights import Shape

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_BYTES = 4 * (1 + len(MOMENTS))
"""Of one parameter in all fragments."""
_FILE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """`values` [n], fp32: elements from `start` on of the flattened parameter `name`, whose own shape is `shape`, or of a moment of it."""

    part: str
    """`WEIGHT` or one of `MOMENTS`."""
    name: str
    shape: Shape
    start: int
    values: Tensor

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.part}/{self.name}@{self.start}"


def write_fragments(folder: Path, prefix: str, fragments: Iterable[Fragment]) -> list[Path]:
    """Writes `PREFIX_00000.safetensors` and so on, about 1 GiB each; values on a GPU come to the host a file at a time."""
    files = []
    for number, part in enumerate(_by_file(fragments)):
        files.append(folder / f"{prefix}_{number:05d}.safetensors")
        shapes = {fragment.name: json.dumps(fragment.shape) for fragment in part}
        save_file({fragment.key: fragment.values.cpu() for fragment in part}, files[-1], metadata=shapes)
    return files


def _by_file(fragments: Iterable[Fragment]) -> Iterator[list[Fragment]]:
    part: list[Fragment] = []
    size = 0
    for fragment in fragments:
        part.append(fragment)
        size += fragment.values.nbytes
        if size >= _FILE_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


class FragmentFolder:
    """All fragments in a folder; opening reads the headers alone, reading what is asked for alone."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where there are none: it is a checkpoint that an earlier version of this program made."""
        self._folder = folder
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, Shape] = {}
        """Of whole parameters, by name."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{folder}: holds no weights that this version of the program reads (*.safetensors); it is of an earlier one")
        for file in files:
            handle = safe_open(file, framework="pt")
            self.shapes |= {name: tuple(json.loads(shape)) for name, shape in handle.metadata().items()}
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                part, _, rest = key.partition("/")
                name, _, start = rest.rpartition("@")
                piece = handle.get_slice(key)
                self._pieces.setdefault((part, name), []).append((int(start), int(start) + piece.get_shape()[0], piece))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])

    def read(self, part: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, or of a moment of it: fp32, on the CPU. Raises ConfigError where some lack."""
        values = empty(stop - start, dtype=float32)
        known = start
        for first, last, piece in self._pieces.get((part, name), []):
            if first <= known < last and known < stop:
                end = min(last, stop)
                values[known - start : end - start] = piece[known - first : end - first]
                known = end
        if known < stop:
            raise ConfigError(f"{self._folder}: lacks elements {known} to {stop - 1} of {part} of {name}; the checkpoint is not whole")
        return values

    def weight(self, name: str) -> Tensor:
        """A whole weight in its shape."""
        shape = self.shapes[name]
        return self.read(WEIGHT, name, 0, math.prod(shape)).view(shape)
