"""A plan as Markdown."""

import itertools
import math
from collections.abc import Sequence

from configs.layers import LayerAttention
from configs.mapping import to_mapping
from configs.schema import RopeConfig
from model.accounting import parameter_counts
from train.calibrate import StageFigures
from train.gpus import GPUS
from train.plan import Plan, StagePlan
from train.report import table


def markdown(plan: Plan, measured: tuple[str, Sequence[StageFigures]] | None = None) -> str:
    """The report: stages, cost, memory, communication, crossovers, notes, and what was measured where it was."""
    config, counts = plan.config, parameter_counts(plan.config.model)
    zero, precision = config.parallel.zero_stage, config.parallel.precision.value
    head = (
        f"# {config.name}: {short(counts.total)} parameters ({short(counts.non_embedding)} without embeddings), "
        f"{short(config.total_tokens)} tokens in {config.total_steps:,} steps, {duration(sum(stage.days for stage in plan.stages))}\n\n"
        f"{config.num_gpus} × {config.gpu}, mfu {config.mfu:g} of {GPUS[config.gpu].peak_flops / 1e12:,.0f} TFLOP/s, ZeRO {zero}, "
        f"{precision}.\n"
        "Rows are reckoned as one document each, the most that they can cost."
    )
    trained, asked = config.total_tokens, sum(stage.tokens for stage in config.stages)
    if trained != asked:
        head += f"\nBudgets are rounded up to whole steps: {trained:,} tokens are trained on for the {asked:,} that were asked for."
    parts = [head, _stages(plan), _cost(plan), _memory(plan)]
    if config.num_gpus > 1:
        parts.append(_communication(plan))
    if plan.mixes:
        parts.append(_documents(plan))
    if plan.crossovers:
        parts.append(_crossovers(plan))
    if measured:
        parts.append(_measured(plan, *measured))
    if plan.notes:
        parts.append("\n".join(["Notes:", *(f"- {note}" for note in plan.notes)]))
    return "\n\n".join(parts)


def describe_layers(attention: Sequence[LayerAttention]) -> str:
    """Which layers have what: `0-28 moba(4096, 12), 29-31 full`; layers are counted from 0."""
    kinds = dict.fromkeys(attention)
    if len(kinds) == 1:
        return f"all {attention[0]}"
    return ", ".join(f"{_ranges([i for i, other in enumerate(attention) if other == kind])} {kind}" for kind in kinds)


def _ranges(layers: Sequence[int]) -> str:
    if len(layers) > 2 and layers[1] - layers[0] > 1 and len({b - a for a, b in itertools.pairwise(layers)}) == 1:
        return f"{layers[0]}, {layers[1]}, … {layers[-1]}"
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def describe_rope(rope: RopeConfig) -> str:
    """Theta, and every setting that is not its default."""
    values, usual = to_mapping(rope), to_mapping(RopeConfig())
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in values.items()}
    changed = [f"{key} {shown[key]}" for key in values if key != "theta" and values[key] != usual[key]]
    return ", ".join([f"theta {rope.theta:,.0f}", *changed])


def _stages(plan: Plan) -> str:
    return table(
        ["stage", "context", "tokens", "steps", "tokens a step", "micro-batches a rank", "attention of the layers", "activations", "RoPE"],
        [
            [
                stage.stage.name,
                f"{stage.stage.seq_len:,}",
                short(stage.tokens),
                f"{stage.stage.steps:,}",
                short(stage.stage.batch_tokens),
                f"{stage.micro_batches} × {stage.micro_batch_rows} rows",
                describe_layers(stage.attention),
                stage.stage.activation.rule,
                describe_rope(stage.stage.rope),
            ]
            for stage in plan.stages
        ],
    )


def _cost(plan: Plan) -> str:
    """FLOPs of a whole stage in units of 10^18."""
    return table(
        ["stage", "executed EFLOP", "as if full EFLOP", "executed / full", "s a step", "tokens/s a GPU", "days"],
        [
            [
                stage.stage.name,
                digits(stage.flops.executed * stage.stage.steps / 1e18),
                digits(stage.flops.dense_equivalent * stage.stage.steps / 1e18),
                f"{stage.flops.executed / stage.flops.dense_equivalent:.3f}",
                digits(stage.seconds),
                f"{stage.stage.batch_tokens / stage.seconds / plan.config.num_gpus:,.0f}",
                digits(stage.days),
            ]
            for stage in plan.stages
        ],
    )


def _memory(plan: Plan) -> str:
    columns = ["weights", "gradients", "optimizer", "activations", "logits", "a layer's backward", "gate and slots", "at the peak"]
    columns += [f"of {plan.config.gpu}", "in host memory"]
    return table(["GB a GPU", *columns], [_memory_row(plan, stage) for stage in plan.stages]) + (
        "\n\nThe peak has the larger of logits and a layer's backward, of which one is over when the other begins. The latter has what is "
        "computed again, and gate and slots of MoBA, before what the FFN has let go of is taken off. The CUDA context and fragmentation "
        "come on top; torch.compile saves less."
    )


def _memory_row(plan: Plan, stage: StagePlan) -> list[str]:
    held, states = stage.held, stage.states
    parts = [states.weights, states.gradients, states.optimizer, held.activations, held.logits, held.workspace, held.gate_and_slots]
    share = stage.memory / GPUS[plan.config.gpu].memory
    return [stage.stage.name, *(gigabytes(part) for part in parts), gigabytes(stage.memory), f"{share:.0%}", gigabytes(held.host)]


def _communication(plan: Plan) -> str:
    config, gpu = plan.config, GPUS[plan.config.gpu]
    rows = []
    for stage in plan.stages:
        sent, times = stage.sent, stage.exchange
        sizes = [gigabytes(part) for part in (sent.gradients, sent.weights, sent.rows, sent.total)]
        seconds = [digits(part) for part in (times.inside, times.between, times.exposed, stage.seconds + times.exposed)]
        rows.append([stage.stage.name, *sizes, *seconds])
    columns = ["gradients", "weights", "shared rows", "together", "s inside a node", "s between nodes", "s exposed", "s a step with it"]
    overlap = (
        "alongside computing, and what computing does not cover is exposed" if config.parallel.zero_stage == 3 else "all of it exposed"
    )
    degree = config.parallel.sequence_parallel
    shared = f"Attention waits for what the {degree} ranks that share a row exchange, so that is exposed. " if degree > 1 else ""
    network = config.network or gpu.network / 1e9
    links = f"{gpu.link / 1e9:g} GB/s a GPU inside a node of {config.gpus_per_node} and {network:g} GB/s a GPU between nodes"
    return table(["GB sent a GPU and step", *columns], rows) + (
        f"\n\nRings over all GPUs at {links}, one way, without latency; the slower of both counts, {overlap}. {shared}"
        "Where mfu is of a run on as many nodes, it is in there already."
    )


def _documents(plan: Plan) -> str:
    """Shares are of a stage's training tokens, those of long documents once a stage."""
    rows = []
    for stage, mix in zip(plan.stages, plan.mixes, strict=True):
        of_stage = [*(f"{share:.1%}" for share in mix.long.values()), f"{mix.padding:.1%}"]
        for pool in mix.pools:
            of_pool = [f"{pool.documents:,}", short(pool.tokens), f"{pool.share:.1%}", digits(pool.epochs)]
            rows.append([stage.stage.name, pool.name, *of_pool, *(of_stage if pool is mix.pools[0] else [""] * len(of_stage))])
    long = [f"of documents ≥ {low:,}" for low in plan.mixes[0].long]
    return table(["stage", "documents", "number", "tokens", "of training tokens", "epochs", *long, "padding"], rows, texts=2)


def _crossovers(plan: Plan) -> str:
    lines = ["MoBA costs less than full attention, a layer of these shapes:"]
    for kind, found in plan.crossovers.items():
        lines.append(f"- {found} ({found.source})" if found else f"- {kind}: at no length that was measured on an {plan.config.gpu}")
    return "\n".join(lines)


def _measured(plan: Plan, device: str, figures: Sequence[StageFigures]) -> str:
    rows = []
    for stage, found in zip(plan.stages, figures, strict=True):
        layers = ", ".join(
            f"{kind}{f', {kept}' if kept != 'none' else ''} {digits(1e3 * layer.seconds)} ms"
            for (kind, kept), layer in found.layers.items()
        )
        rows.append(
            [
                stage.stage.name,
                f"{layers}; ends {digits(1e3 * found.ends.seconds)} ms",
                digits(found.step_seconds),
                digits(stage.seconds),
                digits(stage.flops.executed / plan.config.num_gpus / max(found.step_seconds, 1e-12) / 1e12),
                gigabytes(found.activations),
                gigabytes(found.reckoned),
            ]
        )
    columns = ["s a step", f"planned for {plan.config.gpu}", "TFLOP/s executed", "activations GB", "reckoned for this device"]
    return f"Measured on {device}, one rank's micro-batches, without optimizer and communication:\n\n" + table(
        ["stage", "forward + backward of a layer and micro-batch", *columns], rows
    )


def digits(value: float) -> str:
    """Three digits, or all before the point: 0.0123, 4.13, 5,723."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gigabytes(size: float) -> str:
    """Bytes in GB of 10^9."""
    return digits(size / 1e9)


def short(count: float) -> str:
    """1.05M, 8.03B."""
    exponent = min(4, int(math.log10(count)) // 3) if count >= 1 else 0
    return f"{count / 1000**exponent:.3g}{('', 'K', 'M', 'B', 'T')[exponent]}"


def duration(days: float) -> str:
    """In days, hours, minutes or seconds."""
    units = (("days", 1), ("hours", 24), ("minutes", 1440), ("seconds", 86400))
    unit, number = next((item for item in units if days * item[1] >= 1), units[-1])
    return f"{digits(days * number)} {unit}"
