"""The share of communication: intervals of made-up traces, and a trace of torch's own."""

import pytest
import torch

from scripts.training_benchmark.communication import Communication, communication, covered, read_trace, shares, traced


def test_what_runs_at_once_counts_once():
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1, 1.5), (3, 4)]) == 4 + 2
    assert covered([(0, 10), (2, 3)]) == 10


def kernel(name: str, start: float, end: float, cat: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start}


def test_what_is_exposed_is_what_nothing_else_runs_beside():
    events = [
        {"ph": "M", "name": "process_name"},
        kernel("gemm", 0, 10),
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 8, 20),  # 10 to 14 and 16 to 20 alone
        kernel("Memcpy HtoD (Pinned -> Device)", 14, 16, "gpu_memcpy"),
        kernel("ncclDevKernel_SendRecv", 18, 22),  # beside the other, and 20 to 22
        kernel("gemm", 22, 30),
        kernel("ncclDevKernel_AllGather", 24, 26),  # hidden
        kernel("nccl:all_reduce", 0, 30, "gpu_user_annotation"),  # spans of what the host asked for are no kernels
        kernel("cudaLaunchKernel", 30, 40, "cuda_runtime"),
    ]
    assert communication(events) == Communication(total=pytest.approx(16e-6), exposed=pytest.approx(10e-6))


def test_gloo_shows_what_it_does_and_nothing_of_what_is_exposed():
    events = [
        kernel("aten::mm", 0, 9, "cpu_op"),
        kernel("gloo:all_reduce", 5, 8, "user_annotation"),
        kernel("c10d::allreduce_", 4, 9, "cpu_op"),
    ]
    assert communication(events) == Communication(total=pytest.approx(3e-6), exposed=None)


def test_shares_are_the_mean_over_ranks_and_a_rank_that_shows_nothing_is_a_reason():
    two = [Communication(total=1.0, exposed=0.5), Communication(total=3.0, exposed=1.5)]
    assert shares(two, [4.0, 4.0]) == {"communication": 0.5, "communication_exposed": 0.25, "communication_problem": None}
    assert shares([two[0], None], [4.0, 4.0]) == {
        "communication": None,
        "communication_exposed": None,
        "communication_problem": "the trace shows no collectives",
    }
    assert shares([Communication(total=1.0, exposed=None)], [4.0])["communication"] == 0.25


def test_a_trace_without_collectives_tells_nothing(tmp_path):
    with traced(tmp_path / "trace.json.gz", torch.device("cpu")):
        torch.ones(8) @ torch.ones(8)
    events = read_trace(tmp_path / "trace.json.gz")
    assert any(event.get("name") == "aten::dot" for event in events) and communication(events) is None
