"""Every error of the public doors: it names the argument, the value and what is accepted."""

import numpy as np
import pytest
import torch

from model.ops import sliding
from model.ops.full import full_attention, full_decode
from model.ops.moba import BACKENDS, moba_attention, moba_decode, select_blocks, update_block_means


def good_inputs():
    return {name: torch.zeros(12, heads, 64) for name, heads in (("q", 4), ("k", 2), ("v", 2))}


def cu(*bounds, dtype=torch.int32):
    return torch.tensor(bounds, dtype=dtype)


PACKED_ERRORS = {
    "not a tensor": ({"q": [1.0]}, r"q must be a tensor \[tokens, heads, head_dim\], got list$"),
    "numpy array": ({"q": np.zeros((12, 4, 64))}, r"q must be a tensor \[tokens, heads, head_dim\], got ndarray$"),
    "sparse": ({"k": torch.zeros(12, 2, 64).to_sparse()}, r"k must be a tensor .* got a tensor of layout torch.sparse_coo$"),
    "jagged": ({"q": torch.nested.nested_tensor([torch.zeros(6, 64)] * 2, layout=torch.jagged)}, r"q must be .* got a nested tensor$"),
    "no values": ({name: torch.zeros(12, 2, 64, device="meta") for name in "qkv"}, "q is on meta; accepted: a device that holds values$"),
    "wrong rank": ({"k": torch.zeros(12, 64)}, r"k must be a tensor .* got a tensor of shape \(12, 64\)"),
    "integer dtype": ({"v": torch.zeros(12, 2, 64, dtype=torch.int64)}, r"v has dtype torch.int64; accepted: torch.float16, "),
    "dtypes differ": ({"v": torch.zeros(12, 2, 64).double()}, "v has dtype torch.float64 but q has torch.float32"),
    "devices differ": ({"k": torch.zeros(12, 2, 64, device="meta")}, "k is on meta but q is on cpu"),
    "no tokens": ({name: torch.zeros(0, 2, 64) for name in "qkv"}, r"q has shape \(0, 2, 64\); every dimension must be at least 1"),
    "k and v differ": ({"v": torch.zeros(12, 1, 64)}, r"k has shape \(12, 2, 64\) and v \(12, 1, 64\)"),
    "lengths differ": ({"q": torch.zeros(11, 4, 64)}, "q has T=11 tokens and k T=12"),
    "head dimensions differ": ({"q": torch.zeros(12, 4, 128)}, "q has head dimension 128 and k 64"),
    "heads do not divide": ({"q": torch.zeros(12, 3, 64)}, "q has 3 heads, which k's 2 heads do not divide"),
    "fewer query heads": ({"q": torch.zeros(12, 1, 64)}, "q has 1 heads, which k's 2 heads do not divide"),
    "zero scale": ({"softmax_scale": 0.0}, "softmax_scale=0.0; accepted: None"),
    "scale not a number": ({"softmax_scale": float("nan")}, "softmax_scale=nan"),
    "scale infinite": ({"softmax_scale": float("inf")}, "softmax_scale=inf; accepted: None"),
    "scale negative": ({"softmax_scale": -1}, "softmax_scale=-1; accepted: None"),
    "scale a text": ({"softmax_scale": "0.1"}, r"softmax_scale='0.1'; accepted: None \(head_dim \*\* -0.5\) or a positive finite number$"),
    "scale a truth": ({"softmax_scale": True}, "softmax_scale=True; accepted: None"),
    "scale a tensor": ({"softmax_scale": torch.ones(1)}, r"softmax_scale is a tensor of shape \(1,\); accepted: None"),
    "scale an array": ({"softmax_scale": np.ones(3)}, "softmax_scale is ndarray; accepted: None"),
    "cu_seqlens an array": ({"cu_seqlens": np.array([0, 12])}, r"cu_seqlens must be a tensor \[n_docs\+1\] .* got ndarray$"),
    "cu_seqlens a list": ({"cu_seqlens": [0, 12]}, r"cu_seqlens must be a tensor \[n_docs\+1\] .* got list$"),
    "cu_seqlens too short": ({"cu_seqlens": cu(0)}, r"cu_seqlens must be a tensor .* got a tensor of shape \(1,\)"),
    "cu_seqlens int64": ({"cu_seqlens": cu(0, 12, dtype=torch.int64)}, "cu_seqlens has dtype torch.int64; accepted: torch.int32"),
    "cu_seqlens elsewhere": ({"cu_seqlens": cu(0, 12).to("meta")}, "cu_seqlens is on meta; accepted: cpu"),
    "cu_seqlens start": ({"cu_seqlens": cu(1, 12)}, "cu_seqlens starts at 1; it must start at 0"),
    "empty document": ({"cu_seqlens": cu(0, 5, 5, 12)}, "cu_seqlens goes from 5 to 5; it must strictly increase"),
    "decreasing": ({"cu_seqlens": cu(0, 8, 5, 12)}, "cu_seqlens goes from 8 to 5"),
    "cu_seqlens end": ({"cu_seqlens": cu(0, 11)}, "cu_seqlens ends at 11; it must end at the number of tokens, 12"),
    "backend a tensor": ({"backend": torch.ones(2, 2)}, r"backend is a tensor of shape \(2, 2\); accepted: auto, reference, "),
    "unknown backend": ({"backend": "magic"}, "backend='magic'; accepted: auto, reference, "),
}


@pytest.fixture
def interpreted(monkeypatch):
    """The Triton backend takes CPU tensors; of what is refused here nothing reaches a kernel."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("error", PACKED_ERRORS)
def test_packed_inputs(error, interpreted):
    change, message = PACKED_ERRORS[error]
    arguments = {**good_inputs(), **change}
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=message):
            moba_attention(**{"backend": backend, **arguments}, block_size=64, topk=2)
    with pytest.raises(ValueError, match=message):
        full_attention(**arguments)
    for backend in sliding.BACKENDS:
        with pytest.raises(ValueError, match=message):
            sliding.sliding_attention(**{"backend": backend, **arguments}, window=8)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(interpreted):
    nested = torch.nested.nested_tensor([torch.zeros(6, 64)] * 2)  # whose shape cannot be asked for
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"v must be a tensor \[tokens, heads, head_dim\], got a nested tensor$"):
            moba_attention(**{**good_inputs(), "v": nested}, block_size=64, topk=2, backend=backend)


@pytest.mark.parametrize("window", [0, -3, 4.0, True])
def test_window(window):
    for backend in sliding.BACKENDS:
        with pytest.raises(ValueError, match=f"window={window!r}; accepted: an integer of at least 1"):
            sliding.sliding_attention(**good_inputs(), window=window, backend=backend)


MOBA_ERRORS = {
    "block_size zero": ({"block_size": 0}, "block_size=0; accepted: an integer of at least 1"),
    "block_size negative": ({"block_size": -3}, "block_size=-3"),
    "block_size float": ({"block_size": 4.0}, "block_size=4.0"),
    "topk zero": ({"topk": 0}, "topk=0; accepted: an integer of at least 1"),
    "topk bool": ({"topk": True}, "topk=True"),
    "topk a tensor": ({"topk": torch.ones(9, 9)}, r"topk is a tensor of shape \(9, 9\); accepted: an integer of at least 1"),
}


@pytest.mark.parametrize("error", MOBA_ERRORS)
def test_block_size_and_topk(error, interpreted):
    change, message = MOBA_ERRORS[error]
    inputs, settings = good_inputs(), {"block_size": 64, "topk": 2, **change}
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=message):
            moba_attention(**inputs, **settings, backend=backend)
    with pytest.raises(ValueError, match=message):
        select_blocks(inputs["q"], inputs["k"], **settings)


def test_select_blocks_checks_its_inputs():
    inputs = good_inputs()
    with pytest.raises(ValueError, match="q has head dimension 9 and k 64"):
        select_blocks(torch.zeros(12, 4, 9), inputs["k"], block_size=4, topk=2)
    with pytest.raises(ValueError, match="cu_seqlens ends at 11"):
        select_blocks(inputs["q"], inputs["k"], block_size=4, topk=2, cu_seqlens=cu(0, 11))
    with pytest.raises(ValueError, match="backend='reference'; accepted: torch, triton"):
        select_blocks(inputs["q"], inputs["k"], block_size=4, topk=2, backend="reference")


DECODE_ERRORS = {
    "several tokens": ({"q": torch.zeros(2, 4, 64)}, r"q must be a tensor \[Hq, D\] holding one token, got .*\(2, 4, 64\)"),
    "rank of k": ({"k": torch.zeros(2, 64)}, r"k must be a tensor .* got a tensor of shape \(2, 64\)"),
    "empty cache": ({"k": torch.zeros(0, 2, 64), "v": torch.zeros(0, 2, 64)}, r"k has shape \(0, 2, 64\)"),
    "k and v differ": ({"v": torch.zeros(11, 2, 64)}, r"k has shape \(12, 2, 64\) and v \(11, 2, 64\)"),
    "dtypes differ": ({"q": torch.zeros(4, 64).double()}, "k has dtype torch.float32 but q has torch.float64"),
    "heads do not divide": ({"q": torch.zeros(3, 64)}, "q has 3 heads, which k's 2 heads do not divide"),
    "scale": ({"softmax_scale": -1.0}, "softmax_scale=-1.0"),
}


@pytest.mark.parametrize("error", DECODE_ERRORS)
def test_decode_inputs(error):
    change, message = DECODE_ERRORS[error]
    cache = good_inputs()
    arguments = {**cache, "q": cache["q"][-1], **change}
    with pytest.raises(ValueError, match=message):
        full_decode(**arguments)
    means = update_block_means(None, cache["k"], block_size=4)
    with pytest.raises(ValueError, match=message):
        moba_decode(**arguments, means=means, block_size=4, topk=2)
