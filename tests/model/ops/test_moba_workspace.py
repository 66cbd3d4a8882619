"""What the Triton backend holds at once beside what it is given and gives: no more than the workspace, at any length."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.ops.moba.triton import launch, operator
from model.ops.moba.triton.schedule import Schedule, schedule

MIB = 1 << 20
# T, Hq, Hkv, D, documents, block_size, topk, workspace in MiB
CASES = {
    "one group": (8192, 4, 4, 64, 1, 128, 8, 1024),
    "groups of heads": (131072, 16, 16, 128, 1, 128, 8, 1024),
    "long lists in pieces": (131072, 16, 4, 128, 3, 512, 3, 256),
    "ranges of queries": (1048576, 32, 8, 128, 1, 128, 8, 1024),
    "ranges of queries, few large blocks": (1048576, 8, 1, 128, 1, 4096, 12, 1024),
    "heads listed one by one": (1048576, 32, 4, 64, 1, 64, 8, 512),
    "many short documents": (262144, 16, 2, 128, 4000, 64, 8, 64),
}
# Whether there are several groups of heads, several ranges of queries, and heads of a group that are listed apart.
KINDS = {
    "one group": (False, False, False),
    "groups of heads": (True, False, False),
    "long lists in pieces": (True, True, False),
    "ranges of queries": (True, True, False),
    "ranges of queries, few large blocks": (False, True, False),
    "heads listed one by one": (True, True, True),
    "many short documents": (True, True, True),
}


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside it took at once, those of `others` left out; a tensor that is gone takes none."""

    def __init__(self, *others: torch.Tensor) -> None:
        super().__init__()
        self.most = 0
        self._others = {StorageWeakRef(x.untyped_storage()) for x in others}
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.is_meta and (storage := StorageWeakRef(x.untyped_storage())) not in self._others:
                self._sizes[storage] = x.untyped_storage().nbytes()
        self._sizes = {storage: size for storage, size in self._sizes.items() if not storage.expired()}
        self.most = max(self.most, sum(self._sizes.values()))
        return made


def num_bytes(*tensors):
    return sum(x.untyped_storage().nbytes() for x in tensors)


def tables(cut: Schedule, num_tokens: int, num_kv: int, head_dim: int) -> int:
    """Bytes of what goes with the blocks, beside the workspace: their table, means in two halves and norms; and of a group's lists over one
    range of queries the ends, and the pieces, of 64 entries at least or a list's last."""
    lists, pairs = cut.heads * cut.max_blocks, cut.heads * min(cut.tokens, num_tokens) * cut.num_slots
    return cut.max_blocks * (12 + num_kv * (4 * head_dim + 4)) + 4 * (2 * lists + pairs // 64)


@pytest.mark.parametrize("case", CASES)
def test_what_is_held_at_once_fits_in_the_workspace(case, monkeypatch):
    """Counted on tensors that have sizes alone, for which nothing is launched."""
    num_tokens, num_heads, num_kv, head_dim, num_docs, block_size, topk, mib = CASES[case]
    monkeypatch.setattr(launch.Launch, "__call__", lambda self, *tensors: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    heads = (num_heads, num_kv, num_kv, num_heads)
    q, k, v, d_out = (torch.empty(num_tokens, count, head_dim, dtype=torch.bfloat16, device="meta") for count in heads)
    bounds = torch.linspace(0, num_tokens, num_docs + 1).to(torch.int32)
    sizes = (block_size, topk, head_dim**-0.5, mib * MIB)
    with Held() as forward:
        out, *saved = operator._forward(q, k, v, bounds, *sizes)
    with Held(q, k, v, d_out, out, *saved) as backward:
        grads = operator._backward(q, k, v, bounds, out, *saved, d_out, *sizes)
    cut = schedule((num_tokens, num_heads, head_dim), num_kv, 2, num_docs=num_docs, block_size=block_size, topk=topk, workspace=mib * MIB)
    allowed = mib * MIB + tables(cut, num_tokens, num_kv, head_dim)
    assert forward.most - num_bytes(out, *saved) <= allowed
    assert backward.most - num_bytes(*grads) - 4 * num_heads * num_tokens <= allowed  # <out, d_out> of each query
    # The cases are what they are called.
    assert (cut.num_groups > 1, cut.num_ranges > 1, cut.listed < cut.heads) == KINDS[case]


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads, num_kv, block_size, topk, mib", [(16, 16, 128, 8, 256), (16, 4, 512, 3, 64), (16, 2, 64, 16, 64)])
def test_what_a_gpu_allocates_fits_in_the_workspace(num_heads, num_kv, block_size, topk, mib):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    num_tokens, head_dim, workspace = 65536, 128, mib * MIB
    heads = (num_heads, num_kv, num_kv, num_heads)
    q, k, v, d_out = (torch.randn(num_tokens, count, head_dim, device="cuda", dtype=torch.bfloat16) for count in heads)
    bounds = torch.tensor([0, num_tokens], dtype=torch.int32)
    sizes = (block_size, topk, head_dim**-0.5, workspace)
    cut = schedule(tuple(q.shape), num_kv, 2, num_docs=1, block_size=block_size, topk=topk, workspace=workspace)
    allowed = workspace + tables(cut, num_tokens, num_kv, head_dim) + 2 * MIB  # each tensor's last 512 bytes

    def held(run, *args):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        given = run(*args)
        torch.cuda.synchronize()
        return given, torch.cuda.max_memory_allocated() - before - num_bytes(*given)

    for _ in range(2):  # the first brings the table of the blocks to the device
        (out, *saved), forward = held(operator._forward, q, k, v, bounds, *sizes)
        _, backward = held(operator._backward, q, k, v, bounds, out, *saved, d_out, *sizes)
        assert forward <= allowed and backward - 4 * num_heads * num_tokens <= allowed
        del out, saved
