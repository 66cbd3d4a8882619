"""The attention benchmark: its command line, its check, what it makes of measurements. Speeds need a GPU; nothing else here does."""

import csv
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.layers import LayerAttention
from configs.registry import REPOSITORY, compose
from configs.schema import AttentionKernel, BenchmarkConfig, ConfigError, KernelDocuments, KernelInputs, KernelPrecision
from data.prepare import prepare
from data.shards import Corpus
from model import ops
from model.accounting import FULL
from model.ops.full import full_attention
from model.ops.moba import moba_attention, select_blocks
from model.ops.moba.reference import moba_reference
from scripts import benchmark as door
from scripts.attention_benchmark import check as checks
from scripts.attention_benchmark import measure
from scripts.attention_benchmark.cases import Case, all_cases, draw_inputs, kernel_of, label
from scripts.attention_benchmark.check import NAMES, Check, check, moba_by_rows, near_ties
from scripts.attention_benchmark.measure import BOTH, FORWARD, CudaMeter, Result, Timing
from scripts.attention_benchmark.report import PARTS, floor, gate_flops, markdown, part_of, series, to_csv
from scripts.attention_benchmark.trained import Trained, stream
from tests.train.helpers import corpus_config, execute, overrides

CPU = torch.device("cpu")
SMALL = BenchmarkConfig(num_heads=2, num_kv_heads=1, head_dim=32, lengths=(600,), settings=((64, 3),))
FACTS = {
    "gpu": "A GPU",
    "torch": "2",
    "cuda": "13",
    "triton": "3",
    "date": "2026-01-01",
    "command": "python -m scripts.benchmark attention",
}
KERNEL = AttentionKernel


OF_CASE = ("inputs", "documents", "document_tokens", "trained")


def make_case(num_tokens: int = 600, block_size: int = 64, topk: int = 3, **changes) -> Case:
    attention = LayerAttention(kind="moba", block_size=block_size, topk=topk)
    of_case = {key: changes.pop(key) for key in OF_CASE if key in changes}
    return Case(config=replace(SMALL, **changes), num_tokens=num_tokens, attention=attention, **of_case)


def dense_case(num_tokens: int, **changes) -> Case:
    return Case(config=SMALL, num_tokens=num_tokens, attention=FULL, **changes)


DRAWN = (KernelInputs.RANDOM, KernelInputs.SKEWED)
DOCUMENTS = [
    pytest.param({"documents": KernelDocuments.ONE}, id="one"),
    pytest.param({"documents": KernelDocuments.MIXED}, id="mixed"),
    pytest.param({"documents": KernelDocuments.EQUAL, "document_tokens": 250}, id="equal"),
]
VARIANTS = [pytest.param({"inputs": i, **d.values[0]}, id=f"{i.value}-{d.id}") for i, d in itertools.product(DRAWN, DOCUMENTS)]


# --- the command line --------------------------------------------------------------------------------------------------------------------


def test_the_config_takes_what_people_write():
    arguments = ["lengths=8192", "settings=[[128,8],[512,3]]", "rows=[triton,torch]", "backward=false"]
    arguments += ["inputs=skewed", "documents=[one,equal]", "document_tokens=256"]
    config = compose(BenchmarkConfig, config_name="benchmark", overrides=arguments)
    assert config.lengths == (8192,) and config.settings == ((128, 8), (512, 3)) and config.rows == (KERNEL.TRITON, KERNEL.TORCH)
    assert config.inputs == (KernelInputs.SKEWED,) and config.documents == (KernelDocuments.ONE, KernelDocuments.EQUAL)
    assert (config.document_tokens, config.backward) == ((256,), False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("settings=[[128]]", r"settings=\[128\]: each must be \[block_size, topk\]"),
        ("settings=[128,8]", r"settings=\[128\]: each must be \[block_size, topk\]"),
        ("settings=[[128,0]]", r"settings=\[128, 0\]: .* at least 1"),
        ("lengths=[]", r"lengths=\[\]: must hold at least one"),
        ("lengths=[64,64]", r"lengths=\[64, 64\]: must not hold the same twice"),
        ("rows=[cuddn]", r"rows.0='cuddn': no such choice, did you mean 'cudnn'\?"),
        ("num_kv_heads=3", r"num_heads=16: must be a multiple of num_kv_heads=3"),
        ("repeats=0", r"repeats=0: must be at least 1"),
        ("document_tokens=0", r"document_tokens=0: must be at least 1"),
        ("documents=[one,one]", r"documents=\['one', 'one'\]: must not hold the same twice"),
        ("inputs=trained", r"checkpoint='': must be given for inputs=trained"),
        ("checkpoint=outputs/run", r"checkpoint=outputs/run: is read for inputs=trained alone"),
    ],
)
def test_mistakes_name_the_key(override, message):
    with pytest.raises(ConfigError, match=message):
        compose(BenchmarkConfig, config_name="benchmark", overrides=[override])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what to measure must be given; accepted first word: attention, layers, train, equality, data"),
        (["lengths=64"], "what to measure must be given; accepted first word: attention, layers, train, equality, data"),
        (
            ["atention"],
            "atention: no such benchmark, did you mean 'attention'?; accepted first word: attention, layers, train, equality, data",
        ),
        (["attention", "lenghts=64"], "lenghts: no such key, did you mean 'lengths'?"),
        (["attention", "output_dir=OUTPUT"], "attention: needs a CUDA device and torch sees none"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark", *(word.replace("OUTPUT", str(tmp_path / "new")) for word in arguments)])
    with pytest.raises(SystemExit) as ended:
        door.main()
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")
    assert os.listdir(tmp_path) == []


def test_the_program_as_it_is_typed(tmp_path):
    done = execute([sys.executable, "-m", "scripts.benchmark", "attention", f"output_dir={tmp_path / 'new'}"])
    assert (done.returncode, done.stderr) == (2, "error: attention: needs a CUDA device and torch sees none\n")
    assert os.listdir(tmp_path) == []


# --- cases -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("num_tokens", "block_size", "topk"), [(1, 4, 2), (65, 16, 3), (130, 16, 1), (400, 8, 5)])
def test_the_pairs_of_the_floor_are_those_of_a_count(documents, num_tokens, block_size, topk):
    case = make_case(num_tokens, block_size, topk, **documents)
    seen = 0
    for length in case.lengths:
        for query in range(length):
            own = query // block_size
            seen += min(own, topk - 1) * block_size + query - own * block_size + 1
    assert case.seen == seen
    assert dense_case(num_tokens).seen == num_tokens * (num_tokens + 1) // 2


@pytest.mark.parametrize("num_tokens", [1, 2, 70, 100, 8192, 131072])
def test_mixed_documents_hold_all_tokens(num_tokens):
    lengths = make_case(num_tokens, documents=KernelDocuments.MIXED).lengths
    assert sum(lengths) == num_tokens and min(lengths) >= 1
    if num_tokens >= 8192:
        assert len(set(lengths)) == 5 and num_tokens / 2 <= max(lengths) < 0.51 * num_tokens
        assert all(length % 64 for length in lengths[:-1])


@pytest.mark.parametrize("documents", [*DOCUMENTS[:2], pytest.param({"documents": KernelDocuments.EQUAL, "document_tokens": 1800})])
@pytest.mark.parametrize(
    ("num_tokens", "block_size", "topk"), [(8192, 128, 8), (8192, 512, 3), (131072, 4096, 12), (60000, 4096, 12), (2048, 512, 8)]
)
def test_a_reduced_case_has_a_choice_where_the_case_has_one(documents, num_tokens, block_size, topk):
    case = make_case(num_tokens, block_size, topk, **documents)
    reduced = case.reduced()
    assert reduced.is_full == case.is_full and reduced.attention == case.attention
    assert reduced.num_tokens <= min(num_tokens, max(4096, 2 * (topk + 2) * block_size))
    assert reduced.is_full or reduced.num_tokens == num_tokens or reduced.num_tokens % block_size


def test_dense_rows_come_once_a_length_and_not_where_they_take_too_long():
    config = replace(
        SMALL, lengths=(64, 32, 256), settings=((16, 2), (32, 2)), rows=(KERNEL.TRITON, KERNEL.CUDNN, KERNEL.TORCH), dense_up_to=64
    )
    found = [(row.value, case.num_tokens, str(case.attention)) for row, case in all_cases(config)]
    assert found[:2] == [("cudnn", 32, "full"), ("cudnn", 64, "full")]
    sparse = itertools.product((32, 64, 256), ("moba(16, 2)", "moba(32, 2)"), ("triton", "torch"))
    assert found[2:] == [(row, tokens, attention) for tokens, attention, row in sparse]


def test_rows_come_for_each_kind_of_documents_and_inputs():
    config = replace(
        SMALL,
        lengths=(600,),
        rows=(KERNEL.TRITON, KERNEL.FULL),
        inputs=(KernelInputs.SKEWED, KernelInputs.RANDOM),
        documents=(KernelDocuments.EQUAL, KernelDocuments.MIXED),
        document_tokens=(100, 256),
    )
    found = [(row.value, label(case)) for row, case in all_cases(config)]
    assert found[:4] == [("full", "full"), ("full", "full, mixed"), ("full", "full, 100 each"), ("full", "full, 256 each")]
    kinds = itertools.product(("mixed", "100 each", "256 each"), (", skewed", ""))
    assert found[4:] == [("triton", f"moba(64, 3), {documents}{inputs}") for documents, inputs in kinds]
    assert all_cases(config)[2][1].bounds == [0, 100, 200, 300, 400, 500, 600]
    assert all_cases(config)[3][1].lengths == [256, 256, 88]


def test_inputs_are_those_of_the_seed():
    first, again, other = (draw_inputs(make_case(seed=seed), CPU) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(first, again)) and not torch.equal(first[0], other[0])
    assert [tuple(x.shape) for x in first] == [(600, 2, 32), (600, 1, 32), (600, 1, 32), (600, 2, 32)]
    assert [x.requires_grad for x in first] == [True, True, True, False] and first[0].dtype == torch.bfloat16


def test_skewed_queries_choose_the_sink_and_what_is_near():
    shares, distances = {}, {}
    for inputs in DRAWN:
        case = make_case(8192, 64, 4, inputs=inputs, num_heads=1, head_dim=64)
        chosen = select_blocks(*(x.detach() for x in draw_inputs(case, CPU)[:2]), block_size=64, topk=4)[1024:, 0]
        own = torch.arange(1024, 8192)[:, None] // 64
        shares[inputs] = (chosen == 0).any(-1).double().mean().item()
        distances[inputs] = (own - chosen)[chosen > 0].double().median().item()
    assert shares[KernelInputs.SKEWED] > 0.8 and shares[KernelInputs.RANDOM] < 0.2
    assert distances[KernelInputs.SKEWED] < 0.6 * distances[KernelInputs.RANDOM]


def test_the_kernels_are_called_as_their_packages_want(monkeypatch):
    called = {}

    class Package:
        @staticmethod
        def flash_moba_varlen_func(q, k, v, *arguments, **named):
            called.update(named, arguments=arguments)
            return q

    monkeypatch.setitem(sys.modules, "flash_moba", Package)
    case = make_case(600, documents=KernelDocuments.MIXED)
    kernel_of(KERNEL.FLASH_MOBA, case, CPU)(*draw_inputs(case, CPU)[:3])
    bounds, same, longest, again, block_size, topk = called["arguments"]
    assert bounds is same and bounds.tolist() == case.bounds and bounds.dtype == torch.int32
    assert (longest, again, block_size, topk, called["causal"]) == (max(case.lengths), max(case.lengths), 64, 3, True)

    dense = dense_case(50, documents=KernelDocuments.MIXED)
    for row, backend in ((KERNEL.FULL, "auto"), (KERNEL.CUDNN, "cudnn"), (KERNEL.FLASH, "flash")):
        called = kernel_of(row, dense, CPU)
        assert called.func is full_attention and called.keywords["cu_seqlens"].tolist() == dense.bounds
        assert called.keywords["backend"] == backend


# --- the check ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("topk", [1, 3, 20])
def test_by_rows_is_the_reference_with_every_gradient(changes, topk, monkeypatch):
    case = make_case(300, 16, topk, **changes, num_heads=4, num_kv_heads=2)
    monkeypatch.setattr(checks, "_SCORE_BUDGET", 64 * 300)  # several parts a document
    q, k, v, d_out = draw_inputs(case, CPU)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = moba_reference(*leaves, bounds=case.bounds, block_size=16, topk=topk, softmax_scale=32**-0.5)
    expected = (out, *torch.autograd.grad(out, leaves, d_out.double()))
    found = moba_by_rows(q, k, v, d_out, case, compute=torch.float64, backward=True)
    for name, value in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_dense_rows_are_checked_too(documents):
    case = dense_case(600, **documents)
    attend = kernel_of(KERNEL.FULL, case, CPU)
    assert check(KERNEL.FULL, attend, case, CPU).problem == ""
    assert check(KERNEL.FULL, lambda q, k, v: 1.05 * attend(q, k, v), case, CPU).problem
    if len(case.lengths) > 1:  # documents that see each other
        assert check(KERNEL.FULL, full_attention, case, CPU).problem


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_right_kernel_passes_and_wrong_ones_are_named(changes):
    case = make_case(**changes)

    def judge(spoil) -> str:
        return check(KERNEL.TORCH, spoil(kernel_of(KERNEL.TORCH, case, CPU)), case, CPU).problem

    class Spoil(torch.autograd.Function):
        """The values times one factor, their gradient times another."""

        @staticmethod
        def forward(ctx, x, forward, backward):
            ctx.factor = backward
            return x * forward

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, None, None

    bounds = torch.tensor(case.bounds, dtype=torch.int32)
    assert judge(lambda attend: attend) == ""
    assert " of out " in judge(lambda attend: lambda q, k, v: Spoil.apply(attend(q, k, v), 1.05, 1))
    assert " of d_q " in judge(lambda attend: lambda q, k, v: attend(Spoil.apply(q, 1, 1.05), k, v))
    assert " of d_k " in judge(lambda attend: lambda q, k, v: attend(q, Spoil.apply(k, 1, 1.05), v))
    assert " of d_v " in judge(lambda attend: lambda q, k, v: attend(q, k, Spoil.apply(v, 1, 1.05)))
    assert judge(lambda attend: lambda q, k, v: moba_attention(q, k, v, block_size=64, topk=2, cu_seqlens=bounds))
    assert judge(lambda attend: lambda q, k, v: attend(q, k, v) * torch.nan).startswith("error nan of ")


def test_without_backward_the_output_alone_is_checked():
    case = make_case(backward=False)
    found = check(KERNEL.TORCH, lambda q, k, v: kernel_of(KERNEL.TORCH, case, CPU)(q, k, v).detach(), case, CPU)
    assert list(found.errors) == ["out"] and found.problem == ""


def test_choices_that_rounding_decides_are_left_out_and_no_others():
    case = make_case(512, 32, 4, num_kv_heads=2)
    q, k, *_ = (x.detach() for x in draw_inputs(case, CPU))
    exact = select_blocks(q.double(), k.double(), block_size=32, topk=4).sort(dim=-1).values
    means = torch.stack([block.float().mean(0) for block in k.split(32)]).bfloat16().repeat_interleave(32, dim=0)
    coarse = select_blocks(q, means, block_size=32, topk=4).sort(dim=-1).values
    flipped = (exact != coarse).any(-1)
    near = near_ties(q, k, case, rounding=2.0**-8)
    assert flipped.double().mean() > 0 and not (flipped & ~near).any()
    assert near.double().mean() < 0.2 and near_ties(q, k, case, rounding=2.0**-16).double().mean() < 0.01
    assert not near[:128].any()  # no choice there

    copied = torch.cat([k[:32]] * 16)  # every block the same: the choice is free, wherever there is one
    assert near_ties(q, copied, case, rounding=2.0**-16)[128:].all()


def test_a_query_that_is_left_out_changes_nothing():
    case = make_case(512, 32, 4)
    inputs = draw_inputs(case, CPU)
    near = near_ties(inputs[0].detach(), inputs[1].detach(), case, rounding=2.0**-8)

    def flips(q, k, v):
        right = kernel_of(KERNEL.TORCH, case, CPU)(q, k, v)
        return torch.where(near[..., None], moba_attention(q, k, v, block_size=32, topk=2), right)

    assert near.any() and check(KERNEL.FLASH_MOBA, flips, case, CPU).problem == ""
    assert check(KERNEL.TORCH, flips, case, CPU).problem  # of a gate in fp32 more is asked


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_choices_that_are_none_of_fp64s_are_counted(documents, monkeypatch):
    case = make_case(600, 32, 3, **documents)
    q, k, *_ = draw_inputs(case, CPU)

    def as_kernel(q, k, *, backend="torch", **sizes):  # the gate of the triton backend: in its own order, some of its choices wrong
        chosen = select_blocks(q.double(), k.double(), **sizes).flip(-1)
        if backend == "triton":
            chosen[300:, 0, 0] = torch.where(chosen[300:, 0, 0] >= 0, 10**6, -1)
        return chosen

    monkeypatch.setattr(checks, "select_blocks", as_kernel)
    chosen = select_blocks(q, k, block_size=32, topk=3, cu_seqlens=torch.tensor(case.bounds, dtype=torch.int32))
    wrong = int((chosen[300:, 0, 1] >= 0).sum())
    assert wrong > 100 and checks.other_choices(q, k, case) == pytest.approx(wrong / int((chosen >= 0).sum()))
    assert check(KERNEL.TRITON, kernel_of(KERNEL.TORCH, case, CPU), case, CPU).other_choices == checks.other_choices(q, k, case)
    assert check(KERNEL.TORCH, kernel_of(KERNEL.TORCH, case, CPU), case, CPU).other_choices is None


def test_the_gate_that_is_asked_is_the_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the CUDA device")
    case = make_case(400, 64, 2, num_heads=2, head_dim=64, dtype=KernelPrecision.FP16)
    q, k, *_ = draw_inputs(case, CPU)
    assert checks.other_choices(q, k, case) < 1e-2


# --- measurement -------------------------------------------------------------------------------------------------------------------------


class FakeMeter(CudaMeter):
    """A device whose calls take the given times in turn, and on which nothing else is known."""

    device = CPU

    def __init__(self, times=(2.0,), *, no_graph: Exception | None = None):
        self.times, self.calls, self.no_graph = itertools.cycle(times), 0, no_graph

    def time(self, call):
        call()
        self.calls += 1
        return next(self.times)

    def peak(self, call):
        call()
        return 1 << 30

    def capture(self, call):
        if self.no_graph:
            raise self.no_graph
        return call

    def kernels(self, call):
        return {"_gate_kernel": 0.5, "_dk_dv_kernel": 1.0}

    def clear(self):
        pass


def test_a_row_is_measured_pass_by_pass():
    meter = FakeMeter()
    result = measure.measure(KERNEL.TORCH, make_case(repeats=4), meter)
    assert result.problem == "" and not result.is_wrong and result.check.num_tokens == 600
    for times in (result.eager, result.graph):
        assert {name: timing.samples for name, timing in times.items()} == {FORWARD: (2.0,) * 4, BOTH: (2.0,) * 4}
    assert meter.calls == 4 * (2 + 4) and result.peak == {FORWARD: 1 << 30, BOTH: 1 << 30} and result.kernels == {}
    assert list(measure.measure(KERNEL.TORCH, make_case(backward=False), FakeMeter()).eager) == [FORWARD]


def test_long_calls_are_repeated_less():
    timing = measure.measure(KERNEL.TORCH, make_case(repeats=50), FakeMeter((5000.0, 1000.0))).eager[FORWARD]
    assert len(timing.samples) == 10 and Timing(samples=(1.0, 9.0, 2.0)).median == 2.0
    assert len(measure.measure(KERNEL.TORCH, make_case(repeats=50), FakeMeter((60000.0,))).eager[FORWARD].samples) == 3


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory"),
        (ValueError("block_size=7; accepted: multiples of 64"), "refused: block_size=7; accepted: multiples of 64"),
        (RuntimeError("\nCUDA error: an illegal access\nmore"), "failed: RuntimeError: CUDA error: an illegal access"),
        (ImportError("no libcudart"), "failed: ImportError: no libcudart"),
    ],
)
def test_a_row_that_cannot_run_says_so(error, problem, monkeypatch):
    def refuse(*arguments):
        raise error

    monkeypatch.setattr(measure, "kernel_of", refuse)
    result = measure.measure(KERNEL.TORCH, make_case(), FakeMeter())
    assert result.problem == problem and result.eager == {} and not result.is_wrong


def test_a_wrong_row_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "kernel_of", lambda row, case, device: lambda q, k, v: kernel_of(row, case, device)(q, k, v) * 2)
    meter = FakeMeter()
    result = measure.measure(KERNEL.TORCH, make_case(), meter)
    assert result.is_wrong and result.problem.startswith("wrong: error ") and meter.calls == 0


def test_a_call_that_cannot_be_captured_keeps_its_eager_times():
    result = measure.measure(KERNEL.TORCH, make_case(), FakeMeter(no_graph=RuntimeError("operation not permitted\nmore")))
    assert set(result.eager) == {FORWARD, BOTH} and result.graph == {} and result.no_graph == "operation not permitted"


# --- the report --------------------------------------------------------------------------------------------------------------------------


def measured(row: AttentionKernel, case: Case, forward: float, both: float, **more) -> Result:
    eager = {FORWARD: Timing(samples=(forward, forward * 1.5, forward / 2)), BOTH: Timing(samples=(both,) * 3)}
    others = 0.00002 if row is KERNEL.TRITON else None
    errors = {"errors": dict.fromkeys(NAMES, 0.002), "plain": dict.fromkeys(NAMES, 0.004)}
    check = Check(num_tokens=case.num_tokens, left_out=0.001, other_choices=others, **errors)
    return Result(row=row, case=case, check=check, eager=eager, peak={FORWARD: 1 << 29, BOTH: 1 << 30}, **more)


KERNELS = {"_gate_kernel": 0.25, "_past_resident_kernel": 0.5, "_past_streaming_kernel": 0.5, "void cub::DeviceScanKernel<int>": 0.125}


def made_up() -> list[Result]:
    wrong = Check(num_tokens=1, errors={"out": 0.5}, plain={"out": 0.004}, left_out=0.0)
    return [
        measured(KERNEL.CUDNN, dense_case(8192), 1.0, 4.0),
        measured(KERNEL.TRITON, make_case(8192), 0.5, 2.0, kernels=KERNELS, no_graph="not permitted"),
        measured(KERNEL.TRITON, make_case(32768), 2.0, 9.0, kernels=KERNELS),
        Result(row=KERNEL.TORCH, case=make_case(8192), problem="wrong: error 0.5 of out (allowed: 0.008)", check=wrong),
        Result(row=KERNEL.TORCH, case=make_case(32768), problem="out of memory"),
        Result(row=KERNEL.FLASH_MOBA, case=make_case(32768), problem="failed: RuntimeError: illegal access"),
    ]


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_floor_is_the_dense_time_of_the_pairs_seen():
    results = made_up()
    same, longer = results[1].case, results[2].case
    assert floor(same, BOTH, results) == pytest.approx(4.0 * same.seen / (8192 * 8193 / 2))
    assert floor(longer, FORWARD, results) == pytest.approx(1.0 * longer.seen / (8192 * 8193 / 2))  # at the rate of 8K
    assert floor(same, BOTH, results[1:]) is None
    assert floor(dense_case(8192), FORWARD, results) == pytest.approx(1.0)


def test_the_gate_counts_every_query_and_past_block():
    case = make_case(500, 32, 2)
    pairs = sum(query // 32 for query in range(500))
    assert gate_flops(case) == 2 * 2 * 32 * 2 * pairs


def test_the_report_says_what_was_found():
    text = markdown(made_up(), FACTS, ["flash_moba: not installed"])
    rows = rows_of(text)
    triton = next(row for row in rows if row[:5] == ["8K", "one", "random", "moba(64, 3)", "triton"])
    share = make_case(8192).seen / dense_case(8192).seen
    assert triton[5:10] == ["0.5 (0.25 to 0.75)", "2 (2 to 2)", "-", "-", "1.00"]
    assert triton[12:] == [f"{share / 0.5:.0%}", f"{4 * share / 2:.0%}", "4,096,000"]
    assert ["8K", "one", "random", "moba(64, 3)", "torch", "wrong: error 0.5 of out (allowed: 0.008)"] + ["-"] * 9 in rows
    assert ["32K", "one", "random", "moba(64, 3)", "torch", "out of memory"] + ["-"] * 9 in rows
    assert ["32K", "one", "random", "moba(64, 3)", "flash_moba", "failed"] + ["-"] * 9 in rows
    assert ["8K", "moba(64, 3)", "0.25", "0.125", "1", "1.38"] in rows  # gate, index, past blocks, together
    assert next(row for row in rows if row[:2] == ["moba(64, 3)", "8K"])[2:4] == ["61.0", "244.1"]
    for words in [
        *FACTS.values(),
        "2 query and 1 key/value heads of 32, bf16, seed 0",
        "flash_moba: not installed",
        "No CUDA graph of triton moba(64, 3) at 8K: not permitted",
        "flash_moba moba(64, 3) at 32K failed: RuntimeError: illegal access",
        "Floors at 32K tokens: from the dense rate at 8K.",
        "triton was checked against fp64 on 8,192 to 32,768 tokens",
        "near-ties, were left out; up to 2.0e-05 of its choices are none of fp64's.",
    ]:
        assert words in text
    assert len({len(row) for row in rows if row[0] in ("8K", "32K") and len(row) > 8}) == 1


def test_a_report_without_dense_rows_or_backward_has_no_floor():
    case = replace(make_case(2048), config=replace(SMALL, backward=False))
    alone = Result(row=KERNEL.TORCH, case=case, eager={FORWARD: Timing(samples=(1.0,))}, peak={FORWARD: 1 << 30})
    text = markdown([alone], FACTS)
    assert (
        "No floor" in text
        and "fwd+bwd" not in text
        and ["2K", "one", "random", "moba(64, 3)", "torch", "1 (1 to 1)", "-", "1.00", "-", "-", "2,048,000"] in rows_of(text)
    )
    assert "What documents and inputs cost" not in text


def test_documents_and_inputs_are_held_against_one_random_document():
    mixed, skewed = {"documents": KernelDocuments.MIXED}, {"inputs": KernelInputs.SKEWED}
    results = [
        measured(KERNEL.CUDNN, dense_case(8192), 1.0, 4.0),
        measured(KERNEL.FLASH, dense_case(8192, **mixed), 1.0, 2.0),
        measured(KERNEL.TRITON, make_case(8192), 0.5, 2.0),
        measured(KERNEL.TRITON, make_case(8192, **skewed), 0.5, 2.5),
        measured(KERNEL.TRITON, make_case(8192, **mixed), 0.5, 1.8),
        measured(KERNEL.TRITON, make_case(8192, **mixed, **skewed), 0.5, 2.7),
        Result(row=KERNEL.TORCH, case=make_case(8192, **mixed), problem="out of memory"),
    ]
    rows = [row for row in rows_of(markdown(results, FACTS)) if len(row) == 8 and row[0] == "8K"]

    def flops(case):
        pairs = sum(case.attention.block_size * min(q // 64, 2) + q % 64 + 1 for length in case.lengths for q in range(length))
        gate = sum(q // 64 for length in case.lengths for q in range(length) if length > 3 * 64)
        return 14 * pairs + 4 * gate

    work = flops(make_case(8192, **mixed)) / flops(make_case(8192))
    assert 0.5 < work < 1
    assert rows == [
        ["8K", "moba(64, 3)", "triton", "one, skewed", "one, random", "1.250", "1.000", "1.25"],
        ["8K", "moba(64, 3)", "triton", "mixed, random", "one, random", "0.900", f"{work:.3f}", f"{0.9 / work:.2f}"],
        ["8K", "moba(64, 3)", "triton", "mixed, skewed", "one, skewed", "1.080", f"{work:.3f}", f"{1.08 / work:.2f}"],
        ["8K", "moba(64, 3)", "triton", "mixed, skewed", "mixed, random", "1.500", "1.000", "1.50"],
    ]
    lines = [line for line in csv.DictReader(to_csv(results, FACTS).splitlines()) if line["kernel"] == "flash"]
    share = dense_case(8192, **mixed).seen / dense_case(8192).seen
    assert (lines[0]["documents"], lines[0]["num_documents"]) == ("mixed", "5")
    assert float(lines[0]["both_efficiency"]) == pytest.approx(4 * share / 2)


def test_the_csv_holds_every_figure():
    lines = list(csv.DictReader(to_csv(made_up(), FACTS).splitlines()))
    assert [line["kernel"] for line in lines] == ["cudnn", "triton", "triton", "torch", "torch", "flash_moba"]
    first, triton, longer, wrong, *_ = lines
    assert (first["block_size"], first["both_ms"], first["both_floor_ms"]) == ("", "4.0", "")
    assert (triton["block_size"], triton["topk"], triton["forward_ms"], triton["forward_least_ms"], triton["forward_most_ms"]) == (
        "64",
        "3",
        "0.5",
        "0.25",
        "0.75",
    )
    assert float(triton["both_efficiency"]) == pytest.approx(float(triton["both_floor_ms"]) / 2.0)
    assert (triton["part_past blocks_ms"], triton["part_index_ms"], triton["forward_graph_ms"], triton["error_d_k"]) == (
        "1.0",
        "0.125",
        "",
        "0.002",
    )
    assert (triton["floor_rate_tokens"], longer["floor_rate_tokens"]) == ("8192", "8192")
    assert wrong["problem"].startswith("wrong") and wrong["both_ms"] == "" and wrong["error_out"] == "0.5"
    assert all(line["gpu"] == "A GPU" and line["command"] == FACTS["command"] for line in lines)


def test_the_figure_has_a_line_a_kernel_and_a_floor():
    panels = series(made_up())
    share = [make_case(tokens).seen / dense_case(8192).seen for tokens in (8192, 32768)]
    assert panels[BOTH][:2] == [("cudnn", "full", [(8192, 4.0)]), ("triton", "moba(64, 3)", [(8192, 2.0), (32768, 9.0)])]
    assert panels[FORWARD][2] == ("floor", "moba(64, 3)", [(8192, pytest.approx(share[0])), (32768, pytest.approx(share[1]))])


SOURCES = "\n".join(path.read_text() for path in sorted((REPOSITORY / "model/ops/moba/triton").glob("*.py")))


def test_every_kernel_of_ours_belongs_to_a_part_and_every_part_to_a_kernel():
    kernels = sorted(
        {name for name in SOURCES.replace("(", " ").split() if name.startswith("_") and name.endswith("_kernel")} - {"_kernel"}
    )
    assert len(kernels) >= 10
    assert {part_of(name) for name in kernels} == set(PARTS)
    expected = {
        "_own_kernel": "own block, merge",
        "_dq_own_kernel": "dQ own, sum",
        "_past_resident_kernel": "past blocks",
        "_dq_past_kernel": "dQ past",
    }
    assert {name: part_of(name) for name in expected} == expected
    assert part_of("void at::native::vectorized_elementwise_kernel") == "other"


# --- the command, all but the GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_gpu(monkeypatch):
    """The command's surroundings with a made-up device."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(door, "CudaMeter", FakeMeter)


def start(monkeypatch, folder: Path, *more: str) -> int:
    small = [
        "lengths=[300,600]",
        "settings=[[64,3]]",
        "num_heads=2",
        "num_kv_heads=1",
        "head_dim=32",
        "rows=[torch,flash_moba]",
        "repeats=3",
    ]
    monkeypatch.setattr(sys, "argv", ["benchmark", "attention", *small, f"output_dir={folder}", *more])
    try:
        door.main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_command_prints_a_table_and_writes_its_files(without_gpu, monkeypatch, tmp_path, capsys):
    assert start(monkeypatch, tmp_path / "new") == 0
    printed = capsys.readouterr()
    assert (
        rows_of(printed.out)[-1][:6] == ["600", "one", "random", "moba(64, 3)", "torch", "2 (2 to 2)"]
        and "flash_moba: not installed" in printed.out
    )
    assert (
        "`python -m scripts.benchmark attention 'lengths=[300,600]'" in printed.out
        and "600 tokens, moba(64, 3), torch: forward 2 ms" in printed.err
    )
    assert sorted(os.listdir(tmp_path / "new")) == ["attention.csv", "attention.png"]
    assert len((tmp_path / "new" / "attention.csv").read_text().splitlines()) == 3
    assert (tmp_path / "new" / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_row_ends_with_status_1_and_the_others_measured(without_gpu, monkeypatch, tmp_path, capsys):
    def spoil(row, case, device):
        return lambda q, k, v: kernel_of(row, case, device)(q, k, v) * (2 if case.num_tokens < 500 else 1)

    monkeypatch.setattr(measure, "kernel_of", spoil)
    assert start(monkeypatch, tmp_path) == 1
    cells = {row[0]: row[5] for row in rows_of(capsys.readouterr().out)}
    assert cells["300"].startswith("wrong: error ") and cells["600"] == "2 (2 to 2)"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=FOLDER/file", "output_dir=FOLDER/file: is a file; choose a folder"),
        ("rows=flash_moba", "rows=flash_moba: none can be measured; see dense_up_to=131072 and what is installed"),
        ("output_dir=/proc/none", "output_dir=/proc/none: cannot be made (No such file or directory)"),
    ],
)
def test_what_cannot_be_begun_is_one_line(override, message, without_gpu, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert start(monkeypatch, tmp_path, override.replace("FOLDER", str(tmp_path))) == 2
    assert capsys.readouterr().err == f"error: {message.replace('FOLDER', str(tmp_path))}\n"


# --- trained inputs ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, str]:
    """A corpus and a run of two steps on it, by the keys that name them; the model has 2 layers of 4 query and 2 key/value heads."""
    folder = tmp_path_factory.mktemp("trained")
    prepare(corpus_config(folder / "corpus"))
    more = ["stages.0.tokens=1024", "evaluation.rows=0", 'attention.rule="first 1 full, rest moba"']
    more += ["model.key_conv=3", "rope.nope=first 1"]  # so what a layer attends with depends on documents, and on which layer it is
    jobs = [{"overrides": overrides(folder / "corpus", folder / "run", *more), "kill_in_step": None}]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = execute([sys.executable, "-m", "tests.train.driver", str(folder / "jobs.json")])
    assert done.returncode == 0, done.stderr
    return {"checkpoint": str(folder / "run"), "data.prepared_dir": str(folder / "corpus")}


def asked(run: dict[str, str], *more: str) -> BenchmarkConfig:
    places = [f"{key}={value}" for key, value in run.items()]
    return compose(BenchmarkConfig, config_name="benchmark", overrides=[*places, "inputs=[random,trained]", "lengths=[300]", *more])


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
@pytest.mark.parametrize("bounds", [[0, 300], [0, 1, 130, 300]])
def test_trained_inputs_are_what_the_layer_attends_with(run, layer, bounds, monkeypatch):
    trained = Trained.open(asked(run, f"layer={layer}"), CPU)
    drawn = trained.draw(bounds)
    attended = []
    for module, name in ((ops.full, "full_attention"), (ops.moba, "moba_attention")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *qkv, plain=plain, **more: attended.append(qkv) or plain(*qkv, **more))
    tokens = torch.from_numpy(stream(Corpus.open(run["data.prepared_dir"]), 300).astype(np.int64))
    positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(bounds)])
    with torch.no_grad():
        trained.model(tokens, positions, torch.tensor(bounds, dtype=torch.int32))
    assert [str(kind) for kind in trained.model.attention] == ["full", "moba(32, 2)"] and len(attended) == 2
    assert all(torch.equal(x, y) for x, y in zip(drawn, attended[layer]))
    assert drawn[0].dtype == torch.bfloat16 and not drawn[0].requires_grad
    again = draw_inputs(make_case(300, inputs=KernelInputs.TRAINED, trained=trained, num_heads=4, num_kv_heads=2), CPU)
    assert [x.requires_grad for x in again] == [True, True, True, False]
    assert bounds != [0, 300] or all(torch.equal(x, y) for x, y in zip(again, drawn))


def test_the_stream_is_the_longest_documents_held_out_ones_first(run):
    corpus = Corpus.open(run["data.prepared_dir"])
    tables = [corpus.split(name) for name in ("heldout", "train")]
    whole = [t.tokens(n) for t in tables for n in sorted(range(t.num_documents), key=lambda n, t=t: (-t.lengths[n], n))]
    assert len(whole) > 50
    for num_tokens in (1, len(whole[0]), len(whole[0]) + 5, tables[0].num_tokens + 9, sum(t.num_tokens for t in tables)):
        assert np.array_equal(stream(corpus, num_tokens), np.concatenate(whole)[:num_tokens])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layer=2", "layer=2: the checkpoint's model has layers 0 to 1, or -2 to -1 from the last"),
        ("layer=-3", "layer=-3: the checkpoint's model has layers"),
        ("checkpoint=FOLDER/none", "checkpoint=FOLDER/none: no such checkpoint or run folder"),
        ("lengths=[100000000]", r"lengths=100000000: the corpus of data.prepared_dir=\S+ has \d+ tokens$"),
        ("num_heads=32", r"num_heads=32: the model of checkpoint=\S+ has 4; leave it out"),
    ],
)
def test_trained_inputs_that_cannot_be_had_are_one_line(run, override, message, without_gpu, tmp_path):
    with pytest.raises(ConfigError, match=f"^{message.replace('FOLDER', str(tmp_path))}"):
        door.benchmark(asked(run, override.replace("FOLDER", str(tmp_path)), f"output_dir={tmp_path / 'new'}"))
    assert os.listdir(tmp_path) == []


def test_the_command_measures_trained_inputs_beside_random_ones(run, without_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    config = asked(run, "settings=[[64,3]]", "rows=[torch]", "documents=[one,mixed]", "repeats=3", f"output_dir={tmp_path}")
    results = door.benchmark(config)
    assert [label(result.case) for result in results] == [
        *("moba(64, 3)", "moba(64, 3), trained", "moba(64, 3), mixed", "moba(64, 3), mixed, trained")
    ]
    assert [result.problem for result in results] == [""] * 4
    assert {(r.case.config.num_heads, r.case.config.num_kv_heads) for r in results} == {(4, 2)}
    assert "num_heads=4, num_kv_heads=2, head_dim=" in capsys.readouterr().err
    text = markdown(results, FACTS)
    assert f"Trained inputs: q, k and v of layer -1 of {run['checkpoint']}" in text
    assert ["300", "moba(64, 3)", "torch", "one, trained", "one, random", "1.000", "1.000", "1.00"] in rows_of(text)


@pytest.mark.gpu
def test_on_a_gpu_every_figure_is_there(monkeypatch, tmp_path, capsys):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.chdir(REPOSITORY)
    more = ["lengths=[4096]", "settings=[[128,3]]", "num_heads=4", "num_kv_heads=4", "head_dim=128", "rows=[triton,torch,cudnn,flash,full]"]
    assert start(monkeypatch, tmp_path, *more) == 0
    lines = {line["kernel"]: line for line in csv.DictReader((tmp_path / "attention.csv").open())}
    for kernel in ("triton", "torch", "cudnn", "flash", "full"):
        assert lines[kernel]["problem"] == "" and float(lines[kernel]["both_ms"]) > float(lines[kernel]["forward_ms"]) > 0
        assert int(lines[kernel]["both_peak_bytes"]) >= 4096 * 4 * 128 * 2
    for kernel in ("triton", "cudnn", "flash", "full"):
        assert float(lines[kernel]["both_graph_ms"]) > 0, lines[kernel]["no_graph"]
    parts = {name: float(ms) for name, ms in lines["triton"].items() if name.startswith("part_") and ms}
    assert set(parts) >= {"part_gate_ms", "part_index_ms", "part_past blocks_ms", "part_dK, dV_ms"}
    assert sum(parts.values()) < 2 * float(lines["triton"]["both_ms"])
