"""What the Triton backend does not take is said before any launch, never served by another."""

import pytest
import torch

from model.ops.moba import moba_attention, select_blocks
from model.ops.moba.triton import limits
from model.ops.moba.triton.limits import refusal, refused_kind


@pytest.mark.parametrize(
    "shape, dtype, block_size, topk, message",
    [
        ((9, 2, 64), torch.float64, 64, 2, "q has dtype torch.float64; accepted: torch.float16, torch.float32"),
        ((9, 2, 64), torch.bfloat16, 64, 2, "q has dtype torch.bfloat16; accepted: torch.float16, torch.float32"),
        ((9, 2, 96), torch.float16, 64, 2, "q has head dimension 96; accepted: 64, 128"),
        ((9, 2, 64), torch.float16, 96, 2, "block_size=96; accepted: multiples of 64 up to 32768"),
        ((9, 2, 64), torch.float16, 32, 2, "block_size=32; accepted: multiples of 64 up to 32768"),
        ((9, 2, 64), torch.float16, 32832, 2, "block_size=32832; accepted: multiples of 64 up to 32768"),
        ((9, 2, 64), torch.float16, 64, 65, "topk=65; accepted: 1 to 64"),
    ],
)
def test_what_it_does_not_take_is_said(shape, dtype, block_size, topk, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a CPU will do then
    q = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=f"^backend='triton': {message}; backend='torch' takes others$"):
        moba_attention(q, q[:, :1], q[:, :1], block_size=block_size, topk=topk, backend="triton")
    with pytest.raises(ValueError, match=f"^backend='triton': {message}; backend='torch' takes others$"):
        select_blocks(q, q[:, :1], block_size=block_size, topk=topk, backend="triton")


def test_without_interpreter_a_cpu_is_refused_and_auto_takes_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (torch.randn(200, heads, 64) for heads in (2, 1, 1))
    with pytest.raises(ValueError, match=r"^backend='triton': q is on cpu; accepted: a CUDA device; backend='torch' takes others$"):
        moba_attention(q, k, v, block_size=64, topk=2, backend="triton")
    auto, torch_backend = (moba_attention(q, k, v, block_size=64, topk=2, backend=name) for name in ("auto", "torch"))
    assert torch.equal(auto, torch_backend)


def test_a_gpu_takes_16_bits(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = torch.device("cuda", 0)
    assert refused_kind(gpu, torch.float32) == "q has dtype torch.float32; accepted: torch.bfloat16, torch.float16"
    assert refused_kind(gpu, torch.bfloat16) is None


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(limits, "_HAS_TRITON", False)
    q = torch.zeros(9, 1, 64)
    assert refusal(q, q, num_docs=1, block_size=64, topk=2) == "the package triton is not installed"


def test_more_choices_than_the_index_counts_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k = (torch.empty(1 << 20, heads, 64, device="meta") for heads in (64, 1))
    said = "T=1048576, topk=64 and 64 query heads for each key head make 4227858432 choices; accepted: below 2**31"
    assert refusal(q, k, num_docs=1, block_size=64, topk=64) == said
    assert refusal(q, k, num_docs=1, block_size=64, topk=2) is None


def test_more_blocks_than_a_key_of_the_sort_holds_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.empty(1 << 20, 1, 64, device="meta")
    said = "T=1048576, block_size=64 and 507904 documents make up to 524288 blocks; accepted: 524287"
    assert refusal(q, q, num_docs=507904, block_size=64, topk=2) == said
    assert refusal(q, q, num_docs=507903, block_size=64, topk=2) is None


@pytest.mark.parametrize("workspace", [0, -1, 1.5, "1GiB"])
def test_a_workspace_that_is_none(workspace):
    q = torch.zeros(9, 1, 64)
    with pytest.raises(ValueError, match=f"^workspace={workspace!r}; accepted: an integer of at least 1$"):
        moba_attention(q, q, q, block_size=64, topk=2, workspace=workspace)
