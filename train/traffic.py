"""What ranks send each other in an optimizer step, in bytes and seconds, under DeepSpeed 0.19 as `train.engine` sets it up.

ZeRO's collectives go round a ring of all N ranks: in an all-gather or a reduce-scatter of S bytes each rank sends S (N-1)/N, in an
all-reduce twice that (Thakur et al. 2005, section 4). The ring of a node's GPUs leaves it once, over all of its network adapters together.
Ranks that share rows send each of the others its part straight, to those in other nodes by the GPU's own network adapter.
"""

from dataclasses import dataclass

from configs.schema import ParallelConfig, PlanConfig, StageConfig
from model.accounting import exchange_bytes
from train.gpus import GPUS
from train.kernels import compute_dtype

# ZeRO-3 keeps what it has gathered up to this many elements (`max_live_parameters` and `max_reuse_distance` of DeepSpeed 0.19).
GATHERED = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step, by what for."""

    gradients: float
    """Summed over ranks."""
    weights: float
    """Gathered from their shards."""
    rows: float = 0
    """Exchanged around attention by ranks that share rows."""

    @property
    def total(self) -> float:
        """All parts."""
        return self.gradients + self.weights + self.rows


def traffic(parallel: ParallelConfig, *, num_parameters: int, world_size: int, micro_batches: int, rows: int = 0) -> Traffic:
    """`rows` bytes of them in a micro-batch (`row_bytes`), the rest by ZeRO.

    Counted on the engine's own collectives at 2 ranks, see the tests; padding, norms and flags left out.

    ZeRO 1 sums gradients once a step, ZeRO 2 and 3 after each micro-batch. DeepSpeed's ZeRO 2 does it with an all-reduce, so it sends
    more than ZeRO 1, not less. ZeRO 3 gathers the weights of each forward pass, and for the backward pass again what it could not keep.
    """
    item = compute_dtype(parallel.precision).itemsize
    once = item * num_parameters * (world_size - 1) / world_size  # a reduce-scatter or an all-gather of all parameters
    exchanged = rows * micro_batches
    if parallel.zero_stage == 0:
        return Traffic(gradients=2 * once, weights=0, rows=exchanged)
    if parallel.zero_stage < 3:
        return Traffic(gradients=2 * once * (micro_batches if parallel.zero_stage == 2 else 1), weights=once, rows=exchanged)
    again = max(0, num_parameters - GATHERED) / num_parameters
    return Traffic(gradients=once * micro_batches, weights=(1 + again) * once * micro_batches, rows=exchanged)


def row_bytes(config: PlanConfig, stage: StageConfig) -> int:
    """Bytes that one rank sends the others that share its rows in a micro-batch, of all layers."""
    degree = config.parallel.sequence_parallel
    tokens = config.micro_batch_rows(stage, config.num_gpus) * stage.seq_len // degree
    itemsize = compute_dtype(config.parallel.precision).itemsize
    layers = stage.activation.per_layer(config.model.num_layers)
    return sum(exchange_bytes(config.model, kept, tokens=tokens, degree=degree, itemsize=itemsize) for kept in layers)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Seconds of an optimizer step that the links are busy, at their full rate and without latency."""

    inside: float
    """Between the GPUs of a node."""
    between: float
    """Between nodes; 0 where there is one."""
    exposed: float
    """Of the slower of both, what no computation covers: ZeRO 0 to 2 exchange while nothing is computed, as DeepSpeed's `overlap_comm`
    is off there by default; ZeRO 3 exchanges meanwhile, and all that fits is taken to be covered. Attention waits for its rows."""


def exchange(config: PlanConfig, sent: Traffic, *, computing: float) -> Exchange:
    """The time of `sent` on the GPUs of a plan, whose step computes for so many seconds."""
    gpu, in_node = GPUS[config.gpu], min(config.gpus_per_node, config.num_gpus)
    network = config.network * 1e9 or gpu.network
    by_zero = sent.gradients + sent.weights
    inside = by_zero / gpu.link if in_node > 1 else 0.0
    between = by_zero / (in_node * network) if config.num_gpus > config.gpus_per_node else 0.0
    covered = computing if config.parallel.zero_stage == 3 else 0.0
    exposed = max(0.0, max(inside, between) - covered)
    rows_inside, rows_between = _seconds_of_rows(config, sent.rows, link=gpu.link, network=network)
    return Exchange(inside=inside + rows_inside, between=between + rows_between, exposed=exposed + max(rows_inside, rows_between))


def _seconds_of_rows(config: PlanConfig, sent: float, *, link: float, network: float) -> tuple[float, float]:
    """Inside a node and between nodes, of the rank that has fewest of its group in its node."""
    degree, of_node = config.parallel.sequence_parallel, config.gpus_per_node
    if degree == 1:
        return 0.0, 0.0

    def beside(rank: int) -> int:
        """Ranks both of its group and of its node: either are consecutive."""
        first, node = rank // degree * degree, rank // of_node * of_node
        return min(first + degree, node + of_node) - max(first, node)

    near, to_each = min(map(beside, range(config.num_gpus))), sent / (degree - 1)
    return to_each * (near - 1) / link, to_each * (degree - near) / network
