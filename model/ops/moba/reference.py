"""MoBA, literally: the specification that every fast backend is tested against.

Source: Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189, section 2.2, eq. 2-6.
"""

import itertools

import torch
from torch import Tensor


def moba_reference(q: Tensor, k: Tensor, v: Tensor, *, bounds: list[int], block_size: int, topk: int, softmax_scale: float) -> Tensor:
    """MoBA attention in O(T²) time and memory, in fp32 (fp64 for fp64 inputs), differentiable by autograd.

    q `[T, Hq, D]`, k and v `[T, Hkv, D]`, `bounds` the document boundaries `[0, ..., T]`; returns `[T, Hq, D]` in
    q's dtype. Query head h reads key/value head h // (Hq // Hkv).
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    outputs = []
    for start, end in itertools.pairwise(bounds):
        q_doc = q[start:end].to(compute)
        k_doc, v_doc = (x[start:end].to(compute).repeat_interleave(group, dim=1) for x in (k, v))
        seen = seen_blocks(q_doc.detach(), k_doc.detach(), block_size, topk)  # [L, H, n_blocks]
        position = torch.arange(end - start, device=q.device)
        causal = position[:, None, None] >= position  # [L, 1, L]
        visible = seen[:, :, position // block_size] & causal  # [L, H, L]
        scores = torch.einsum("qhd,khd->qhk", q_doc, k_doc) * softmax_scale
        probs = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("qhk,khd->qhd", probs, v_doc))
    return torch.cat(outputs).to(q.dtype)


def seen_blocks(q_doc: Tensor, k_doc: Tensor, block_size: int, topk: int) -> Tensor:
    """Which blocks each query of one document sees: bool `[L, H, n_blocks]`, from q and k `[L, H, D]`.

    Own block always; of the blocks wholly before it the topk-1 with the highest <q, mean of the block's keys>.
    """
    block_means = torch.stack([block.mean(dim=0) for block in k_doc.split(block_size)])
    gate = torch.einsum("qhd,nhd->qhn", q_doc, block_means)
    block = torch.arange(len(block_means), device=q_doc.device)
    own_block = torch.arange(len(q_doc), device=q_doc.device)[:, None, None] // block_size
    is_past = block < own_block  # [L, 1, n_blocks]
    # A stable sort keeps tied blocks in index order: ties go to the lower block.
    ranking = gate.masked_fill(~is_past, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    is_top = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, ranking[..., : topk - 1], True)
    return (is_top & is_past) | (block == own_block)
