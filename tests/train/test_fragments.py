"""Fragments of parameters: whatever way they were cut, any stretch of them is read back, and what lacks is said."""

import itertools

import pytest
import torch

from configs.schema import ConfigError
from train import fragments
from train.fragments import MOMENTS, WEIGHT, Fragment, FragmentFolder, write_fragments

WHOLE = {(part, name): torch.randn(shape) for part in (WEIGHT, *MOMENTS) for name, shape in (("a.weight", (7, 9)), ("b", (5,)))}


def _cut(part: str, name: str, *bounds: int) -> list[Fragment]:
    whole = WHOLE[part, name]
    pairs = itertools.pairwise(bounds)
    return [Fragment(part=part, name=name, shape=tuple(whole.shape), start=a, values=whole.flatten()[a:b]) for a, b in pairs]


@pytest.mark.parametrize("file_bytes", [1, 100, 10**6])
def test_every_stretch_is_read_from_whatever_was_cut(tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr(fragments, "_FILE_BYTES", file_bytes)
    cuts = {"a.weight": (0, 1, 20, 62, 63), "b": (0, 5)}
    pieces = [piece for part, name in WHOLE for piece in _cut(part, name, *cuts[name])]
    pieces += _cut(WEIGHT, "a.weight", 10, 30)  # ranks that hold the same may both write it
    for rank in range(3):
        write_fragments(tmp_path, f"rank_{rank:05d}", pieces[rank::3])
    assert (len(list(tmp_path.iterdir())) == 3) == (file_bytes == 10**6)
    saved = FragmentFolder(tmp_path)
    assert saved.shapes == {"a.weight": (7, 9), "b": (5,)}
    for (part, name), whole in WHOLE.items():
        flat = whole.flatten()
        for start in range(len(flat)):
            for stop in {start + 1, min(start + 20, len(flat)), len(flat)}:
                assert torch.equal(saved.read(part, name, start, stop), flat[start:stop])
    assert torch.equal(saved.weight("a.weight"), WHOLE[WEIGHT, "a.weight"])


def test_what_lacks_is_said(tmp_path):
    write_fragments(tmp_path, "rank_00000", [*_cut(WEIGHT, "a.weight", 0, 20), *_cut(WEIGHT, "a.weight", 30, 63)])
    saved = FragmentFolder(tmp_path)
    assert torch.equal(saved.read(WEIGHT, "a.weight", 40, 63), WHOLE[WEIGHT, "a.weight"].flatten()[40:])
    with pytest.raises(ConfigError, match=r"lacks elements 20 to 62 of weight of a.weight; the checkpoint is not whole$"):
        saved.weight("a.weight")
    with pytest.raises(ConfigError, match=r"lacks elements 0 to 4 of exp_avg of b"):
        saved.read("exp_avg", "b", 0, 5)
