"""Mixture of Block Attention (MoBA, arXiv 2502.13189) over packed documents."""

from model.ops.moba.api import BACKENDS, moba_attention
from model.ops.moba.decode import moba_decode, update_block_means
from model.ops.moba.routing import select_blocks
from model.ops.moba.statistics import GATE_STATISTICS, GateStatistics, gate_statistics

__all__ = [
    "BACKENDS",
    "GATE_STATISTICS",
    "GateStatistics",
    "gate_statistics",
    "moba_attention",
    "moba_decode",
    "select_blocks",
    "update_block_means",
]
