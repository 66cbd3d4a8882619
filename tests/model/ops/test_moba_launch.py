"""Launches that are prepared once: what goes through Triton, what calls the compiled kernel again, and with what."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from model.ops.moba.triton import launch
from model.ops.moba.triton.launch import Launch

TENSOR = torch.empty(16)
STREAM = 7


class Kernel:
    """A kernel of Triton's that only notes how it was launched."""

    def __init__(self):
        self.fn = self
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **options):
            self.compiled.append((grid, args, options))
            return SimpleNamespace(function="function", packed_metadata="metadata", run=lambda *args: self.launched.append(args))

        return compile_and_launch


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: STREAM)))


def test_the_first_is_compiled_and_those_after_it_are_called():
    kernel = Kernel()
    prepared = Launch(kernel, (3, 2), 5, 0.5, SIZE=64, warps=8)
    for _ in range(3):
        prepared(TENSOR, TENSOR)
    assert kernel.compiled == [((3, 2), (TENSOR, TENSOR, 5, 0.5), {"SIZE": 64, "num_warps": 8})]
    assert kernel.launched == [(3, 2, 1, STREAM, "function", "metadata", None, None, None, TENSOR, TENSOR, 5, 0.5, 64)] * 2


@pytest.mark.parametrize(
    "number, warps, size, dtype, is_new",
    [
        (7, 4, 64, torch.float32, False),
        (1, 4, 64, torch.float32, True),
        (48, 4, 64, torch.float32, True),
        (5 + 2**31, 4, 64, torch.float32, True),
        (5, 8, 64, torch.float32, True),
        (5, 4, 32, torch.float32, True),
        (5, 4, 64, torch.bfloat16, True),
    ],
)
def test_another_of_the_same_kind_is_not_compiled(number, warps, size, dtype, is_new):
    kernel = Kernel()
    Launch(kernel, (1, 1), 5, SIZE=64, warps=4)(TENSOR)
    Launch(kernel, (9, 1), number, SIZE=size, warps=warps)(TENSOR.to(dtype))
    assert (len(kernel.compiled), len(kernel.launched)) == ((2, 0) if is_new else (1, 1))


def test_numbers_of_one_kind_are_one_to_triton():
    """The kinds are at least as fine as what the installed Triton compiles for."""
    numbers = [0, 1, 2, 15, 16, 17, 48, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, 2**40, -1, -16, 0.5, 0.125]
    kinds = {number: native_specialize_impl(CUDABackend, number, False, True, True) for number in numbers}
    assert len(set(kinds.values())) == 6  # 1 is a constant
    for left, right in itertools.combinations(numbers, 2):
        if launch._specialized(left) == launch._specialized(right):
            assert kinds[left] == kinds[right], (left, right)
