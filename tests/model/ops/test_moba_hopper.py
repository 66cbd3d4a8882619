"""The Gluon kernels for Hopper, which no interpreter runs: that they compile, run without waits that nobody asked for, and fit the chip.

What they compute is tested on a GPU: here beside the kernels for others, in test_moba_triton.py against fp64.
"""

import math
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from model.ops.moba import moba_attention
from model.ops.moba.triton import backward, forward, hopper, plan
from model.ops.moba.triton.launch import Launch
from model.ops.moba.triton.plan import tile_of
from model.ops.moba.triton.schedule import power_of_2
from tests.model.ops.helpers import cu_seqlens, forward_backward, make_inputs, with_dtype

# Triton's interpreter puts its own functions into these, and leaves some of them there.
LANGUAGE = {
    owner: dict(vars(owner))
    for module in [
        module for name, module in sys.modules.items() if name.startswith(("triton.language", "triton.experimental.gluon.language"))
    ]
    for owner in (module, *(item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__))
}
SHARED_MEMORY = 227 << 10  # bytes a program may have on compute capability 9.0
POINTERS = {
    "LSE": "*fp32",
    "SLOT_LSE": "*fp32",
    "NORM": "*fp32",
    "DELTA": "*fp32",
    "PARTIAL": "*fp32",
    "scale": "fp32",
    "softmax_scale": "fp32",
}
POINTERS |= dict.fromkeys(("ENTRIES", "BEGIN", "END", "ENDS", "PIECE", "START", "LENGTH", "DOC_FIRST", "CHOSEN"), "*i32")
POINTERS |= dict.fromkeys(("Q", "K", "V", "D_OUT", "DK", "DV", "DQ_SLOTS", "SLOTS", "HIGH", "LOW"), "*bf16")


@pytest.fixture(autouse=True)
def language_of_the_compiler():
    """What tests before these have interpreted is no part of what is compiled."""
    for owner, plain in LANGUAGE.items():
        for name, value in plain.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)


def compile_for_hopper(kernel, warps, constants, *, group, types=POINTERS, registers=None):
    """As a call with `group` query heads to a key head has it: Triton makes a constant of a number that is 1, where the kernel lets it."""
    names, constants = kernel.arg_names, dict(constants)
    if group == 1 and "group" in names and not kernel.params[names.index("group")].do_not_specialize:
        constants["group"] = 1
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or "stride" in name]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "maxnreg": registers})


def with_keys(tile, head_dim):
    """The arguments' types where keys and values are tensor descriptors."""
    layout = gl.NVMMASharedLayout.get_default_for([tile.columns, head_dim], gl.bfloat16)
    keys = f"tensordesc<bf16[{tile.columns}, {head_dim}],{layout!r}>"
    return POINTERS | {"K": keys, "V": keys}


def remarks(compiled, tmp_path):
    """What the assembler says of the kernel."""
    code = tmp_path / "kernel.ptx"
    code.write_text(compiled.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", str(code), "-o", str(tmp_path / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    "head_dim, block_size, is_long",
    [
        (128, 128, False),
        (128, 128, True),
        (64, 128, False),
        (128, 512, False),
        (128, 512, True),
        (128, 192, False),
        (64, 64, None),
        (64, 192, True),
    ],
)
def test_dk_dv_compiles(head_dim, block_size, is_long, group, tmp_path):
    """`is_long` None: without lists."""
    tile = tile_of("hopper_dk_dv", block_size)
    constants = {
        "TILES": block_size // tile.columns,
        "D": head_dim,
        "P": 7,
        "BK": tile.columns,
        "SPLIT": 8192,
        "LISTS": is_long is not None,
    }
    constants |= {"LONG": bool(is_long), "KEEP_DQ": block_size == 128, "INT": tl.int64 if is_long else tl.int32}
    how = hopper.DK_DV_WARPS[tile.columns]
    check(compile_for_hopper(hopper.dk_dv_kernel, how["warps"], constants, group=group, registers=how["registers"]), tmp_path)


@pytest.mark.parametrize(
    "head_dim, block_size, num_past, columns",
    [(128, 128, 7, 64), (128, 512, 2, 32), (64, 192, 7, 16), (64, 4096, 31, 64), (64, 64, 63, 64)],
)
def test_gate_compiles(head_dim, block_size, num_past, columns, tmp_path):
    tile = tile_of("hopper_gate", block_size)
    constants = {"TILES": -(-block_size // tile.rows), "D": head_dim, "P": num_past, "BQ": tile.rows, "BN": columns}
    constants["SLOTS"] = max(8, power_of_2(num_past))
    registers = 128 if tile.warps == 8 else None
    compiled = compile_for_hopper(hopper.gate_kernel, tile.warps, constants, group=1, registers=registers)
    check(compiled, tmp_path)
    assert 2 * compiled.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("head_dim, block_size", [(128, 128), (128, 64), (64, 128)])
def test_past_compiles(head_dim, block_size, tmp_path):
    constants = {"B": block_size, "D": head_dim, "P": 7, "SIZE": 1024, "INT": tl.int32}
    compiled = compile_for_hopper(hopper.past_kernel, tile_of("past", block_size).warps, constants, group=1)
    check(compiled, tmp_path)
    assert 2 * compiled.metadata.shared <= SHARED_MEMORY  # one program computes while another waits


@pytest.mark.parametrize(
    "head_dim, block_size, integer, group", [(128, 4096, tl.int32, 1), (64, 256, tl.int64, 1), (128, 192, tl.int64, 4)]
)
def test_past_of_large_blocks_compiles(head_dim, block_size, integer, group, tmp_path):
    tile = tile_of("hopper_past", block_size)
    constants = {"B": block_size, "D": head_dim, "P": 11, "BN": tile.columns, "INT": integer, "STAGES": tile.stages}
    types = with_keys(tile, head_dim)
    compiled = compile_for_hopper(hopper.past_streaming_kernel, tile.warps, constants, group=group, types=types)
    check(compiled, tmp_path)
    assert re.search(r"\b0 bytes spill stores", remarks(compiled, tmp_path))
    assert compiled.asm["ptx"].count("setmaxnreg") > 0  # the registers of warps that copy go to those that multiply


@pytest.mark.parametrize("head_dim, block_size, integer", [(128, 4096, tl.int32), (128, 512, tl.int64), (64, 64, tl.int32)])
def test_dq_compiles(head_dim, block_size, integer, tmp_path):
    tile = tile_of("hopper_dq", block_size)
    constants = {"B": block_size, "D": head_dim, "P": 11, "INT": integer}
    compiled = compile_for_hopper(hopper.dq_past_kernel, tile.warps, constants, group=1, types=with_keys(tile, head_dim))
    check(compiled, tmp_path)
    assert re.search(r"\b0 bytes spill stores", remarks(compiled, tmp_path))


def check(compiled, tmp_path):
    said = remarks(compiled, tmp_path)
    assert "wgmma" in compiled.asm["ptx"] and compiled.metadata.shared <= SHARED_MEMORY
    assert "Potential Performance Loss" not in said  # products that wait for each other
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) < 256


@pytest.fixture
def calls_anew():
    """What was prepared for calls of other kernels is forgotten, before and after."""
    plan._call_of.cache_clear()
    yield
    plan._call_of.cache_clear()


@pytest.mark.parametrize(
    "block_size, topk, head_dim, workspace",
    [(128, 8, 128, 1 << 30), (512, 3, 128, 1 << 30), (64, 4, 64, 1 << 30), (192, 4, 128, 4 << 20), (4096, 3, 128, 1 << 30)],
)
def test_launches_fit_their_kernels(block_size, topk, head_dim, workspace, calls_anew, monkeypatch):
    """On Hopper every kernel is given its parameters in their order: tensors, numbers of the right values, constants of the right names."""
    num_tokens, launched = 20000, []
    known = {"group": 2, "num_tokens": num_tokens, "num_blocks": -(-num_tokens // block_size), "first_head": 0}
    known |= {"stride_t": 4 * head_dim, "stride_h": head_dim, "kv_stride_t": 2 * head_dim, "kv_stride_h": head_dim}
    known |= {"out_stride_t": 4 * head_dim, "grad_stride_t": 4 * head_dim, "grad_stride_h": head_dim, "dq_stride_t": 4 * head_dim}
    known |= {"dk_stride_t": 2 * head_dim, "scale": head_dim**-0.5 / math.log(2), "softmax_scale": head_dim**-0.5}
    known |= {"num_lists": 4 * known["num_blocks"], "range_tokens": num_tokens, "first_token": 0, "end_token": num_tokens}
    in_parts = {
        "first_head",
        "num_lists",
        "range_tokens",
        "first_token",
        "end_token",
        "first_block",
    }  # of heads or queries, where memory asks

    def launch(self, *tensors):
        names = self._kernel.arg_names
        numbers = dict(zip(names[len(tensors) :], self._numbers))
        constants = names[len(tensors) + len(self._numbers) :]
        name = self._kernel.fn.__name__
        assert constants == [option for option in self._options if option not in ("num_warps", "maxnreg")], name
        for number, value in numbers.items():
            if hasattr(hopper, name) and (workspace >= 1 << 30 or number not in in_parts):
                assert value == pytest.approx(known[number]), (name, number)
        launched.append(name)

    monkeypatch.setattr(Launch, "__call__", launch)
    monkeypatch.setattr(plan, "is_hopper", lambda device: True)
    for module in (forward, backward):
        monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    q, k, v, d_out = (x.detach() for x in with_dtype(make_inputs(num_tokens, 4, 2, head_dim, seed=0), torch.bfloat16))
    sizes = cu_seqlens([0, num_tokens]), block_size, topk, head_dim**-0.5, workspace
    out, *saved = torch.ops.moba.forward.default(q, k, v, *sizes)
    torch.ops.moba.backward.default(q, k, v, sizes[0], out, *saved, d_out, *sizes[1:])
    kernels = {"gate_kernel", "past_kernel" if block_size <= 128 else "past_streaming_kernel", "dk_dv_kernel"}
    kernels |= set() if block_size == 128 else {"dq_past_kernel"}
    assert kernels == {name for name in launched if not name.startswith("_")}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "num_tokens, bounds, num_heads, num_kv_heads, head_dim, block_size, topk",
    [
        pytest.param(32768, [0, 32768], 4, 4, 128, 128, 8, id="128, 8"),
        pytest.param(32768, [0, 9000, 9001, 32768], 8, 2, 128, 128, 8, id="128, 8, grouped heads, documents"),
        pytest.param(70000, [0, 70000], 2, 2, 128, 128, 3, id="128, 3, long lists"),
        pytest.param(16384, [0, 16384], 4, 1, 64, 128, 16, id="128, 16, D 64"),
        pytest.param(16384, [0, 16384], 2, 2, 128, 64, 8, id="64, 8"),
        pytest.param(16384, [0, 16384], 4, 2, 128, 192, 4, id="192, 4"),
        pytest.param(32768, [0, 32767, 32768], 4, 4, 128, 512, 3, id="512, 3"),
        pytest.param(20000, [0, 12000, 20000], 4, 2, 64, 1024, 4, id="1024, 4, D 64, documents"),
        pytest.param(32768, [0, 32768], 2, 1, 128, 4096, 3, id="4096, 3"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_it_gives_what_kernels_for_other_gpus_give_and_repeats(
    dtype, num_tokens, bounds, num_heads, num_kv_heads, head_dim, block_size, topk, calls_anew, monkeypatch
):
    if not torch.cuda.is_available() or not plan.is_hopper(torch.device("cuda", 0)):
        pytest.skip("no GPU of compute capability 9.0")
    inputs = [x.cuda() for x in with_dtype(make_inputs(num_tokens, num_heads, num_kv_heads, head_dim, seed=num_tokens), dtype)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():  # most queries choose the first block, whose list is then long
        inputs[0] += 2 * inputs[1][:block_size, :1].mean(0) * block_size**0.5 / head_dim**0.5

    def attention(q, k, v):
        return moba_attention(q, k, v, cu_seqlens=cu_seqlens(bounds), block_size=block_size, topk=topk, backend="triton")

    found = forward_backward(attention, inputs)
    for _ in range(20):
        assert all(torch.equal(value, found[name]) for name, value in forward_backward(attention, inputs).items())
    monkeypatch.setattr(plan, "is_hopper", lambda device: False)
    plan._call_of.cache_clear()
    for name, value in forward_backward(attention, inputs).items():  # a choice in 100,000 may be another: a score on the edge of a step
        assert (found[name].double() - value.double()).norm() < 5e-3 * value.double().norm(), name
