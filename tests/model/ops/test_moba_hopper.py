"""The Gluon kernels for Hopper, which no interpreter runs: that they compile, run without waits that nobody asked for, and fit the chip.

What they compute is tested on a GPU, in test_moba_triton.py.
"""

import re
import subprocess
import sys

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from model.ops.moba.triton import hopper
from model.ops.moba.triton.plan import tile_of

# Triton's interpreter puts its own functions into these, and leaves some of them there.
LANGUAGE = {
    owner: dict(vars(owner))
    for module in [
        module for name, module in sys.modules.items() if name.startswith(("triton.language", "triton.experimental.gluon.language"))
    ]
    for owner in (module, *(item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__))
}
SHARED_MEMORY = 227 << 10  # bytes a program may have on compute capability 9.0
POINTERS = {"LSE": "*fp32", "DELTA": "*fp32", "PARTIAL": "*fp32", "scale": "fp32", "softmax_scale": "fp32"}
POINTERS |= dict.fromkeys(("ENTRIES", "BEGIN", "END", "ENDS", "PIECE", "START", "LENGTH"), "*i32")
POINTERS |= dict.fromkeys(("Q", "K", "V", "D_OUT", "DK", "DV", "DQ_SLOTS"), "*bf16")


@pytest.fixture(autouse=True)
def language_of_the_compiler():
    """What tests before these have interpreted is no part of what is compiled."""
    for owner, plain in LANGUAGE.items():
        for name, value in plain.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)


def compile_for_hopper(kernel, warps, constants, *, group, **options):
    """As a call with `group` query heads to a key head has it: Triton makes a constant of a number that is 1, where the kernel lets it."""
    names, constants = kernel.arg_names, dict(constants)
    if group == 1 and "group" in names and not kernel.params[names.index("group")].do_not_specialize:
        constants["group"] = 1
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or "stride" in name]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **options})


def remarks(compiled, tmp_path):
    """What the assembler says of the kernel."""
    code = tmp_path / "kernel.ptx"
    code.write_text(compiled.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", str(code), "-o", str(tmp_path / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    "head_dim, block_size, is_long", [(128, 128, False), (128, 128, True), (128, 512, True), (64, 64, None), (64, 192, True)]
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
    check(compile_for_hopper(hopper.dk_dv_kernel, tile.columns // 16, constants, group=group), tmp_path)


@pytest.mark.parametrize("head_dim, block_size", [(128, 512), (64, 64)])
def test_dq_compiles(head_dim, block_size, tmp_path):
    tile = tile_of("hopper_dq", block_size)
    constants = {"B": block_size, "D": head_dim, "P": 2, "BM": tile.rows, "INT": tl.int32}
    check(compile_for_hopper(hopper.dq_past_kernel, tile.warps, constants, group=1), tmp_path)


def check(compiled, tmp_path):
    said = remarks(compiled, tmp_path)
    assert "wgmma" in compiled.asm["ptx"] and compiled.metadata.shared <= SHARED_MEMORY
    assert "Potential Performance Loss" not in said  # products that wait for each other
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) < 256
