"""Full attention by the backends for GPUs: on a GPU as they are; on the CPU with stand-ins for the kernels, which show how they are called."""

import contextlib
import itertools
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from model.ops.full import full_attention, gpu, packed, sdpa
from model.ops.full.packed import runs
from model.ops.full.sdpa import cudnn_length
from model.ops.moba import moba_attention
from tests.model.ops.helpers import (
    assert_error_within_twice,
    assert_fills_nothing_for_no_gradient,
    cu_seqlens,
    forward_backward,
    make_inputs,
    plain_attention,
    with_dtype,
)

BOUNDS = [0, 1, 2, 140, 141, 390, 391, 400, 600]
LONG = 128  # tokens: what `auto` takes for long here


# --- stand-ins -----------------------------------------------------------------------------------------------------------------------------


def check_call(tensors, bounds, others, longest, dropout, is_causal):
    """What FlashAttention takes: packed tensors with rows on 16 bytes, and their boundaries."""
    for x in tensors:
        assert x.dim() == 3 and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        assert all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
    assert bounds is others and bounds.dtype == torch.int32 and bounds.is_contiguous()
    assert longest == bounds.diff().max() and (dropout, is_causal) == (0.0, True)


def by_document(bounds):
    return [slice(start, end) for start, end in itertools.pairwise(bounds.tolist())]


def scores_of(q, k, scale):
    """fp32 `[Hq, L, L]`, -inf where a query does not see."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    return scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))


class Flash:
    """In place of the kernels under `aten::_flash_attention_*`: fp32 inside, and the lengths of the documents of each call."""

    def __init__(self):
        self.calls = []

    @torch.autocast("cpu", enabled=False)
    def forward(self, q, k, v, bounds, others, longest, longest_k, dropout, is_causal, debug, *, scale, **unused):
        check_call((q, k, v), bounds, others, longest, dropout, is_causal)
        assert longest_k == longest and not debug
        self.calls.append(bounds.diff().tolist())
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
        for part in by_document(bounds):
            scores = scores_of(q[part], k[part], scale)
            lse[:, part] = scores.logsumexp(-1)
            values = v[part].float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            out[part] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
        return out, lse, torch.zeros(2, dtype=torch.uint64), q.new_empty(0), q.new_empty(0)

    @torch.autocast("cpu", enabled=False)
    def backward(self, d_out, q, k, v, out, lse, bounds, others, longest, longest_k, dropout, is_causal, state, unused, *, scale, **_):
        check_call((q, k, v, out), bounds, others, longest, dropout, is_causal)
        assert longest_k == longest and state.dtype == torch.uint64 and lse.shape == (q.shape[1], len(q))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        group = q.shape[1] // k.shape[1]
        for part in by_document(bounds):
            keys, values = (x[part].float().repeat_interleave(group, dim=1) for x in (k, v))
            d_part, probs = d_out[part].float(), (scores_of(q[part], k[part], scale) - lse[:, part, None]).exp()
            delta = (d_part * out[part].float()).sum(-1).t()
            d_scores = probs * (torch.einsum("qhd,khd->hqk", d_part, values) - delta[..., None]) * scale
            d_q = torch.einsum("hqk,khd->qhd", d_scores, keys)
            d_k, d_v = (torch.einsum("hqk,qhd->khd", x, y.float()) for x, y in ((d_scores, q[part]), (probs, d_part)))
            for grad, found in zip(grads, (d_q, *(x.unflatten(1, (-1, group)).sum(2) for x in (d_k, d_v)))):
                grad[part] = found.to(q.dtype)
        return tuple(grads)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the backends run, and in which dtype; of stand-ins, what was called."""

    device: str
    dtype: torch.dtype
    flash: Flash | None = None
    cudnn: list | None = None

    def inputs(self, *sizes: int, seed: int) -> list[torch.Tensor]:
        """As `make_inputs`: q, k, v and the gradient that a loss sends back."""
        *leaves, d_out = make_inputs(*sizes, seed=seed, dtype=self.dtype)
        return [*(x.detach().to(self.device).requires_grad_() for x in leaves), d_out.to(self.device)]


@pytest.fixture(
    params=[
        pytest.param(("cpu", torch.float16), id="stand-ins"),
        pytest.param(("cuda", torch.bfloat16), id="bf16", marks=pytest.mark.gpu),
        pytest.param(("cuda", torch.float16), id="fp16", marks=pytest.mark.gpu),
    ]
)
def target(request, monkeypatch):
    device, dtype = request.param
    monkeypatch.setattr(packed, "CUDNN_LENGTH", LONG)
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
        yield Target(device=device, dtype=dtype)
        return
    flash, cudnn = Flash(), []

    @contextlib.contextmanager
    def force(kernel):
        cudnn.append(kernel)
        yield

    stand_in_for_gpu(monkeypatch)
    monkeypatch.setattr(sdpa, "sdpa_kernel", force)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash.forward, "CPU")
        library.impl("_flash_attention_backward", flash.backward, "CPU")
        yield Target(device=device, dtype=dtype, flash=flash, cudnn=cudnn)


def stand_in_for_gpu(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def full(backend, bounds=BOUNDS):
    """The backend by its public door. cuDNN, and so `auto` where it takes that, refuses to be deterministic."""

    def run(q, k, v):
        torch.use_deterministic_algorithms(backend == "flash")
        return full_attention(q, k, v, cu_seqlens=cu_seqlens(bounds), backend=backend)

    return run


# --- results ---------------------------------------------------------------------------------------------------------------------------


def assert_exact(run, inputs, bounds=BOUNDS):
    """Output and every gradient are at most twice as far from the specification in fp64 as plain torch of the same dtype."""
    visible = torch.block_diag(*(torch.ones(end - start, end - start).tril() for start, end in itertools.pairwise(bounds))).bool()
    plain = partial(plain_attention, visible=visible.to(inputs[0].device))
    exact = forward_backward(full("reference", bounds), with_dtype(inputs, torch.float64))
    assert_error_within_twice(forward_backward(run, inputs), forward_backward(plain, inputs), exact)


@pytest.mark.parametrize("backend", ["flash", "cudnn", "auto"])
@pytest.mark.parametrize("num_heads, num_kv, head_dim", [(4, 4, 64), (4, 2, 128), (4, 1, 64), (2, 2, 72)])
def test_error_is_at_most_twice_that_of_plain_torch(backend, num_heads, num_kv, head_dim, target):
    for bounds in (BOUNDS, [0, 333], [0, 1]):
        inputs = target.inputs(bounds[-1], num_heads, num_kv, head_dim, seed=91)
        if bounds == [0, 1]:  # a softmax of one score has no gradient, and plain torch no error to compare with
            result = forward_backward(full(backend, bounds), inputs)
            assert torch.equal(result["out"], inputs[2].repeat_interleave(num_heads // num_kv, dim=1))
            assert result["d_q"].abs().max() < 0.1 and result["d_k"].abs().max() < 0.1
        else:
            assert_exact(full(backend, bounds), inputs, bounds)


def fused(q, k, v):
    """Views of one projection's output."""
    parts = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1).split([x[0].numel() for x in (q, k, v)], dim=1)
    return [part.view(x.shape) for part, x in zip(parts, (q, k, v))]


def every_other(x):
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]


def one_element_on(x):
    """The same in memory that begins one element later, on no 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = {
    "fused": fused,
    "heads first": lambda *tensors: [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors],
    "every other element": lambda *tensors: [every_other(x) for x in tensors],
    "unaligned": lambda *tensors: [one_element_on(x) for x in tensors],
    "rows on no 16 bytes": lambda *tensors: [torch.nn.functional.pad(x.flatten(1), (0, 3))[:, :-3].view(x.shape) for x in tensors],
}


@pytest.mark.parametrize("backend", ["flash", "cudnn", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory_is_taken(backend, layout, target):
    q, k, v, d_out = target.inputs(BOUNDS[-1], 4, 2, 64, seed=92)
    strided = [x.requires_grad_() for x in LAYOUTS[layout](*(x.detach() for x in (q, k, v)))]
    assert_exact(full(backend), [*strided, d_out])


@pytest.mark.parametrize("backend", ["flash", "cudnn", "auto"])
def test_any_upstream_gradient_is_taken(backend, target):
    q, k, v, d_out = target.inputs(BOUNDS[-1], 4, 2, 64, seed=93)
    everywhere_one = d_out.new_ones(()).expand_as(d_out)  # of a sum
    for grad in (every_other(d_out), one_element_on(d_out), everywhere_one, d_out[:1].expand_as(d_out)):
        assert_exact(full(backend), [q, k, v, grad])


@pytest.mark.parametrize("kept", [slice(0, 97), slice(2, 140), slice(391, 450)], ids=str)
def test_unseen_tokens_change_no_bit(kept, target):
    q, k, v, d_out = target.inputs(600, 4, 2, 64, seed=94)
    is_kept = torch.zeros(600, 1, 1, dtype=torch.bool, device=target.device)
    is_kept[kept] = True
    others = target.inputs(600, 4, 2, 64, seed=95)
    disturbed = [torch.where(is_kept, x, y).detach().requires_grad_() for x, y in zip((q, k, v), others)]
    before, after = (forward_backward(full("flash"), [*x, d_out * is_kept]) for x in ((q, k, v), disturbed))
    for name, value in before.items():
        assert torch.equal(value[kept], after[name][kept]), name


def test_flash_repeats_to_the_bit_where_torch_is_told_to(target):
    inputs = target.inputs(600, 4, 2, 64, seed=96)
    first, *others = (forward_backward(full("flash"), inputs) for _ in range(4))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_boundaries_may_lie_on_the_device(target):
    q, k, v, _ = (x.detach() for x in target.inputs(600, 4, 2, 64, seed=97))
    bounds = cu_seqlens(BOUNDS).to(target.device)
    assert torch.equal(full_attention(q, k, v, cu_seqlens=bounds, backend="flash"), full("flash")(q, k, v))


def test_recomputed_activations_give_the_same_bits(target):
    inputs = target.inputs(600, 4, 2, 64, seed=98)
    again = partial(checkpoint, full("flash"), use_reentrant=False)
    expected = forward_backward(full("flash"), inputs)
    assert all(torch.equal(value, expected[name]) for name, value in forward_backward(again, inputs).items())


def test_autocast_changes_nothing(target):
    inputs = target.inputs(600, 4, 2, 64, seed=99)
    expected = forward_backward(full("flash"), inputs)
    with torch.autocast(target.device, dtype=torch.float16 if target.dtype == torch.bfloat16 else torch.bfloat16):
        result = forward_backward(full("flash"), inputs)
    assert all(torch.equal(value, expected[name]) for name, value in result.items())


def test_operators_keep_the_rules_of_torch(target):
    q, k, v, _ = target.inputs(60, 2, 1, 64, seed=100)
    torch.library.opcheck(torch.ops.full.flash_forward, (q, k, v, cu_seqlens([0, 20, 60]), 0.125))


@pytest.mark.parametrize("backend", ["flash", "auto", "handed over by moba"])
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_compiled_whole_it_gives_the_same(backend, bounds, target, monkeypatch):
    cu = None if bounds is None else cu_seqlens(bounds)
    torch.use_deterministic_algorithms(True)  # auto then takes FlashAttention alone, compiled or not
    if target.flash:  # torch.compile sees that the tensors are on the CPU
        for module in (gpu, packed):
            monkeypatch.setattr(module, "refusal", lambda backend, q: "not deterministic" if backend == "cudnn" else None)
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    def run(q, k, v):
        if backend not in ("flash", "auto"):
            return 2 * moba_attention(2 * q, k, v, cu_seqlens=cu, block_size=320, topk=2, backend="triton")
        return 2 * full_attention(2 * q, k, v, cu_seqlens=cu, backend=backend)

    inputs = target.inputs(600, 2, 1, 64, seed=101)
    torch._dynamo.reset()  # torch counts the cases before as compilations of one function, of which it allows eight
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if target.device == "cuda" else "aot_eager")
    expected = forward_backward(run, inputs)
    assert all(torch.equal(value, expected[name]) for name, value in forward_backward(compiled, inputs).items())


def test_compiled_one_long_document_goes_to_cudnn(target, monkeypatch):
    torch.use_deterministic_algorithms(False)
    if target.flash:  # a kernel that the CPU has is forced in place of cuDNN's, which torch.compile knows too
        monkeypatch.setattr(sdpa, "sdpa_kernel", sdpa_kernel)
        monkeypatch.setattr(sdpa, "SDPBackend", SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH))
        for module in (gpu, packed):
            monkeypatch.setattr(module, "refusal", lambda backend, q: None)
    compiled = torch.compile(full_attention, fullgraph=True, backend="inductor" if target.device == "cuda" else "aot_eager")
    for length in (600, 601, 900):
        assert_exact(compiled, target.inputs(length, 2, 1, 64, seed=102), [0, length])
    assert not (target.flash and target.flash.calls)


def test_what_has_no_gradient_gets_none(target):
    assert_fills_nothing_for_no_gradient(full("flash", [0, 60]), target.inputs(60, 2, 1, 64, seed=106))


def test_second_derivative_is_refused(target):
    q, k, v, d_out = target.inputs(60, 2, 1, 64, seed=103)
    (d_q,) = torch.autograd.grad(full("flash", [0, 60])(q, k, v), q, d_out, create_graph=True)
    with pytest.raises(RuntimeError, match=r"full.flash_backward.* no autograd formula was registered"):
        torch.autograd.grad(d_q.sum(), q)


def test_the_lengths_that_cudnn_meets_are_few():
    found = {length: cudnn_length(length) for length in range(2, 1 << 15)}
    assert all(length <= rounded <= length * 17 / 16 for length, rounded in found.items())
    assert len(set(found.values())) <= 15 * 16 and all(found[length] == length for length in (2, 9, 512, 8192, 12288))


def test_cudnn_is_called_with_those_lengths(target, monkeypatch):
    lengths, attend = [], sdpa.sdpa_heads

    def record(q, k, v, **more):
        lengths.append((len(q), len(k), len(v)))
        return attend(q, k, v, **more)

    monkeypatch.setattr(sdpa, "sdpa_heads", record)
    full("cudnn", [0, 1, 10, 150, 399])(*target.inputs(399, 2, 1, 64, seed=105)[:3])
    assert lengths == [(length,) * 3 for length in (1, 9, 144, 256)]


def test_importing_it_imports_neither_the_compiler_nor_triton():
    asked = "import sys, model.ops.full; print(sorted({'triton', 'torch._dynamo'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_limits_are_traced_whole(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    @partial(torch.compile, fullgraph=True, backend="eager")
    def limits(x):
        found = (gpu.compute_capability(x.device), gpu._is_deterministic(), gpu._is_built("cudnn"), gpu.refusal("flash", x))
        return x + 1, found

    for deterministic in (True, False, True):
        torch.use_deterministic_algorithms(deterministic)
        expected = ((9, 0), deterministic, torch.backends.cudnn.is_available(), "q is on cpu; accepted: a CUDA device")
        assert limits(torch.zeros(2, 1, 8))[1] == expected


# --- the choice ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ([0, 5], [[0, 5]]),
        ([0, 10], [[0, 10]]),
        ([0, 3, 7, 9], [[0, 3, 7, 9]]),
        ([0, 10, 20], [[0, 10], [10, 20]]),
        ([0, 3, 7, 17, 18, 40, 52, 60, 61], [[0, 3, 7], [7, 17], [17, 18], [18, 40], [40, 52], [52, 60, 61]]),
    ],
)
def test_runs_hold_every_document_once(bounds, expected):
    assert runs(bounds, 10) == expected
    assert sorted({bound for run in expected for bound in run}) == bounds


def chosen_by(target, backend, deterministic=False):
    """Documents of each FlashAttention call, and the number of forced cuDNN calls, of one forward pass over `BOUNDS`."""
    if not target.flash:
        pytest.skip("what is called shows in stand-ins")
    target.flash.calls.clear(), target.cudnn.clear()
    torch.use_deterministic_algorithms(deterministic)
    full_attention(*(x.detach() for x in target.inputs(600, 2, 1, 64, seed=104)[:3]), cu_seqlens=cu_seqlens(BOUNDS), backend=backend)
    assert set(target.cudnn) <= {SDPBackend.CUDNN_ATTENTION}
    return target.flash.calls, len(target.cudnn)


def test_auto_takes_cudnn_for_long_documents_and_flash_for_the_runs_between(target, monkeypatch):
    every_document = [1, 1, 138, 1, 249, 1, 9, 200]
    assert chosen_by(target, "auto") == ([[1, 1], [1], [1, 9]], 3)
    assert chosen_by(target, "flash") == ([every_document], 0)
    assert chosen_by(target, "cudnn") == ([], 4)  # documents of one token are none of cuDNN's
    assert chosen_by(target, "auto", deterministic=True) == ([every_document], 0)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert chosen_by(target, "auto") == ([every_document], 0)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    stand_in_for_gpu(monkeypatch, capability=(8, 0))
    assert chosen_by(target, "auto") == ([every_document], 0)
    stand_in_for_gpu(monkeypatch, capability=(7, 5))
    assert chosen_by(target, "auto") == ([], 0)  # sdpa
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: False))
    assert chosen_by(target, "auto") == ([], 0)


REFUSALS = [
    ({"dtype": torch.float32}, r"q has dtype torch.float32; accepted: torch.bfloat16, torch.float16"),
    ({"head_dim": 65}, r"q has head dimension 65; accepted: multiples of 8 up to (128|256)"),
    ({"head_dim": 264}, r"q has head dimension 264; accepted: multiples of 8 up to (128|256)"),
    ({"capability": (7, 5)}, r"q is on a GPU of compute capability \(7, 5\); accepted: \(8, 0\) and later"),
    ({"built": False}, r"torch is \S+, built without it; accepted: a build with it"),
]


@pytest.mark.parametrize("backend", gpu.BACKENDS)
@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_what_a_backend_does_not_take_is_said(backend, change, message, monkeypatch):
    torch.use_deterministic_algorithms(False)
    stand_in_for_gpu(monkeypatch, capability=change.get("capability", (9, 0)))
    for module, name in ((torch.backends.cudnn, "is_available"), (torch.backends.cuda, "is_flash_attention_available")):
        monkeypatch.setattr(module, name, lambda: change.get("built", True))
    q = torch.zeros(9, 2, change.get("head_dim", 64), dtype=change.get("dtype", torch.bfloat16))
    with pytest.raises(ValueError, match=f"^backend='{backend}': {message}; backend='sdpa' takes others$"):
        full_attention(q, q, q, backend=backend)


def test_cudnn_refuses_to_be_deterministic_and_a_cpu_is_refused(monkeypatch):
    q = torch.zeros(9, 2, 64, dtype=torch.bfloat16)
    for backend in gpu.BACKENDS:
        with pytest.raises(ValueError, match=f"^backend='{backend}': q is on cpu; accepted: a CUDA device; backend='sdpa' takes others$"):
            full_attention(q, q, q, backend=backend)
    stand_in_for_gpu(monkeypatch)
    with pytest.raises(ValueError, match=r"^backend='cudnn': torch\.use_deterministic_algorithms is True; accepted: False, "):
        full_attention(q, q, q, backend="cudnn")
