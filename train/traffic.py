"""What ranks send each other in an optimizer step, in bytes and seconds, under DeepSpeed 0.19 as `train.engine` sets it up.

Collectives go round a ring of all N ranks: in an all-gather or a reduce-scatter of S bytes each rank sends S (N-1)/N, in an all-reduce
twice that (Thakur et al. 2005, section 4). The ring of a node's GPUs leaves it once, over all of its network adapters together.
"""

from dataclasses import dataclass

from configs.schema import ParallelConfig, PlanConfig
from train.gpus import GPUS
from train.kernels import compute_dtype

# ZeRO-3 keeps what it has gathered up to this many elements (`max_live_parameters` and `max_reuse_distance` of DeepSpeed 0.19).
GATHERED = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step, by what for; another kind of parallelism adds its part."""

    gradients: float
    """Summed over ranks."""
    weights: float
    """Gathered from their shards."""

    @property
    def total(self) -> float:
        """All parts."""
        return self.gradients + self.weights


def traffic(parallel: ParallelConfig, *, num_parameters: int, world_size: int, micro_batches: int) -> Traffic:
    """Counted on the engine's own collectives at 2 ranks, see the tests; padding, norms and flags left out.

    ZeRO 1 sums gradients once a step, ZeRO 2 and 3 after each micro-batch. DeepSpeed's ZeRO 2 does it with an all-reduce, so it sends
    more than ZeRO 1, not less. ZeRO 3 gathers the weights of each forward pass, and for the backward pass again what it could not keep.
    """
    item = compute_dtype(parallel.precision).itemsize
    once = item * num_parameters * (world_size - 1) / world_size  # a reduce-scatter or an all-gather of all parameters
    if parallel.zero_stage == 0:
        return Traffic(gradients=2 * once, weights=0)
    if parallel.zero_stage < 3:
        return Traffic(gradients=2 * once * (micro_batches if parallel.zero_stage == 2 else 1), weights=once)
    again = max(0, num_parameters - GATHERED) / num_parameters
    return Traffic(gradients=once * micro_batches, weights=(1 + again) * once * micro_batches)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Seconds of an optimizer step that the links are busy, at their full rate and without latency."""

    inside: float
    """Between the GPUs of a node."""
    between: float
    """Between nodes; 0 where there is one."""
    exposed: float
    """Of the slower of both, what no computation covers: ZeRO 0 to 2 exchange while nothing is computed, as DeepSpeed's `overlap_comm`
    is off there by default; ZeRO 3 exchanges meanwhile, and all that fits is taken to be covered."""


def exchange(config: PlanConfig, sent: Traffic, *, computing: float) -> Exchange:
    """The time of `sent` on the GPUs of a plan, whose step computes for so many seconds."""
    gpu, in_node = GPUS[config.gpu], min(config.gpus_per_node, config.num_gpus)
    inside = sent.total / gpu.link if in_node > 1 else 0.0
    between = sent.total / (in_node * (config.network * 1e9 or gpu.network)) if config.num_gpus > config.gpus_per_node else 0.0
    covered = computing if config.parallel.zero_stage == 3 else 0.0
    return Exchange(inside=inside, between=between, exposed=max(0.0, max(inside, between) - covered))
