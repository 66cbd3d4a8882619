"""What the benchmark found, as Markdown and CSV, with what follows from it: floors, sparse efficiency, parts, time per token."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from configs.schema import AttentionKernel, KernelDocuments, KernelInputs
from model.accounting import FULL, gate_pairs
from scripts.attention_benchmark.cases import Case, label
from scripts.attention_benchmark.check import NAMES
from scripts.attention_benchmark.measure import BOTH, FORWARD, Result, Timing
from scripts.figures import short_count
from train.report import table

Line = tuple[str, str, list[tuple[int, float]]]

PASSES = (FORWARD, BOTH)
# FLOPs of a (query, key) pair, by pass, over the head dimension: two products of 2 each forward, five more backward.
_PAIR_FLOPS = {FORWARD: 4, BOTH: 14}
# Kernels of model/ops/moba/triton by what they do, in the order they run; a name belongs to the first part with a fitting beginning.
PARTS: Mapping[str, tuple[str, ...]] = {
    "means": ("_means_kernel", "_centre_kernel"),
    "gate": ("_gate_kernel", "gate_kernel"),
    "index": ("_count_kernel", "_scatter_kernel", "_cut_kernel"),
    "past blocks": ("_past_", "past_"),
    "own block, merge": ("_own_kernel",),
    "delta": ("_delta_kernel",),
    "dK, dV": ("_dk_dv_kernel", "dk_dv_kernel"),
    "dQ past": ("_dq_past_kernel", "dq_past_kernel"),
    "dQ own, sum": ("_dq_own_kernel",),
}
OTHER = "other"
_NONE = "-"


def part_of(kernel: str) -> str:
    """The part that a kernel belongs to, by its name: one of `PARTS`, or `OTHER`."""
    if "DeviceScan" in kernel:  # torch's running sums: only the index takes them
        return "index"
    return next((part for part, beginnings in PARTS.items() if kernel.startswith(beginnings)), OTHER)


def parts(result: Result) -> dict[str, float]:
    """ms of each part, those without a kernel left out."""
    times: dict[str, float] = {}
    for name in [*PARTS, OTHER]:
        kernels = [ms for kernel, ms in result.kernels.items() if part_of(kernel) == name]
        if kernels:
            times[name] = sum(kernels)
    return times


def dense_of(case: Case, results: Sequence[Result]) -> Result | None:
    """The cuDNN row on one document whose rate a case is held against: of as many tokens, or else of the most that were measured."""
    on_one = [result for result in results if result.case.documents is KernelDocuments.ONE]
    dense = [result for result in on_one if result.row is AttentionKernel.CUDNN and result.eager]
    return max(dense, key=lambda result: (result.case.num_tokens == case.num_tokens, result.case.num_tokens), default=None)


def floor(case: Case, name: str, results: Sequence[Result]) -> float | None:
    """ms that the FLOPs of the tokens really seen take at the dense rate in the pass `name`; None without a dense row.

    Both go by the same FLOPs a (query, key) pair, so that their number does not matter: the pairs' ratio is that of the times.
    """
    dense = dense_of(case, results)
    return dense.eager[name].median * case.seen / dense.case.seen if dense else None


def work(case: Case, name: str) -> int:
    """FLOPs of a pass: the pairs really seen, and the gate's."""
    return _PAIR_FLOPS[name] * case.config.head_dim * case.config.num_heads * case.seen + gate_flops(case)


def gate_flops(case: Case) -> int:
    """FLOPs of the gate: a score for each query and past block (T²/2B of them a head), against the two halves of a block's mean."""
    return 2 * 2 * case.config.head_dim * case.config.num_heads * gate_pairs(case.attention, case.lengths)


def markdown(results: Sequence[Result], facts: Mapping[str, str], missing: Sequence[str] = ()) -> str:
    """The report: main table, notes (`missing` packages among them), parts, time per token. `facts` are those of `describe`."""
    results = sorted(results, key=lambda result: result.case.num_tokens)  # stable: rows of a length keep their order
    config = results[0].case.config
    sections = [
        f"# Attention on {facts['gpu']}",
        f"{config.num_heads} query and {config.num_kv_heads} key/value heads of {config.head_dim}, {config.dtype.value}, "
        f"seed {config.seed}. torch {facts['torch']}, CUDA {facts['cuda']}, "
        f"Triton {facts['triton']}, {facts['date']}.\n\n`{facts['command']}`",
        _main_table(results, config.backward),
        "\n".join(f"- {note}" for note in [*_conventions(config.backward), *missing, *_notes(results)]),
        _ratio_table(results),
        _parts_table(results),
        _token_table(results),
    ]
    return "\n\n".join(section for section in sections if section)


def _main_table(results: Sequence[Result], backward: bool) -> str:
    passes = PASSES if backward else PASSES[:1]
    short = {FORWARD: "forward", BOTH: "fwd+bwd"}
    header = ["tokens", "documents", "inputs", "attention", "kernel"]
    header += [f"{short[name]}{mode}, ms" for mode in ("", ", graph") for name in passes]
    header += ["peak, GiB", *(f"floor {short[name]}, ms" for name in passes), *(f"efficiency {short[name]}" for name in passes), "tokens/s"]
    rows = []
    for result in results:
        case = result.case
        row = [short_count(case.num_tokens), case.documents_label, case.inputs.value, str(case.attention), result.row.value]
        if result.problem:
            said = result.problem if result.is_wrong else result.problem.partition(":")[0]  # the rest is a note
            rows.append(row + [said] + [_NONE] * (len(header) - len(row) - 1))
            continue
        floors = [floor(case, name, results) if has_floor(case) else None for name in passes]
        row += [_spread(result.eager[name]) for name in passes] + [_spread(result.graph.get(name)) for name in passes]
        row += [f"{max(result.peak.values()) / 2**30:.2f}", *(_NONE if ms is None else _ms(ms) for ms in floors)]
        row += [_NONE if ms is None else f"{ms / result.eager[name].median:.0%}" for name, ms in zip(passes, floors)]
        rows.append([*row, f"{tokens_per_second(result):,.0f}"])
    return table(header, rows, texts=5)


def has_floor(case: Case) -> bool:
    """All but dense attention of one document, which is what floors are taken from."""
    return case.attention != FULL or case.documents is not KernelDocuments.ONE


def tokens_per_second(result: Result) -> float:
    """Of the longest pass that was measured."""
    return result.case.num_tokens / list(result.eager.values())[-1].median * 1e3


def _conventions(backward: bool) -> Iterator[str]:
    yield "Times: median (least to most) of calls on an idle GPU; graph: replays of a CUDA graph of the call."
    inputs = "q, k, v and the output's gradient"
    yield f"Peak: most memory allocated beyond {inputs}, in {'forward+backward' if backward else 'forward'}."
    yield "Floor: the (query, key) pairs really seen, of the own block half, at the rate cuDNN reached on dense; efficiency: floor / time."


def _notes(results: Sequence[Result]) -> Iterator[str]:
    sparse = [result for result in results if result.case.attention != FULL]
    if sparse and dense_of(sparse[0].case, results) is None:
        yield "No floor: the cudnn row was not measured at any length."
    for tokens in sorted({result.case.num_tokens for result in sparse}):
        dense = dense_of(next(result.case for result in sparse if result.case.num_tokens == tokens), results)
        if dense and dense.case.num_tokens != tokens:
            yield f"Floors at {short_count(tokens)} tokens: from the dense rate at {short_count(dense.case.num_tokens)}."
    full = [result for result in sparse if result.case.is_full]
    if full:
        yield f"MoBA is full attention where topk x block_size covers the longest document: {_names(full)}."
    config = results[0].case.config
    if KernelInputs.TRAINED in config.inputs:
        yield f"Trained inputs: q, k and v of layer {config.layer} of {config.checkpoint}, which reads a stream of the longest documents."
    for row in dict.fromkeys(result.row for result in results):
        checked = [result for result in results if result.row is row and result.check and not result.problem]
        if checked:
            yield _check_note(row, checked)
    for problem in dict.fromkeys(result.problem for result in results if ":" in result.problem and not result.is_wrong):
        yield f"{_names([result for result in results if result.problem == problem])} {problem}"
    for reason in dict.fromkeys(result.no_graph for result in results if result.no_graph):
        yield f"No CUDA graph of {_names([result for result in results if result.no_graph == reason])}: {reason}"


def _check_note(row: AttentionKernel, results: Sequence[Result]) -> str:
    checks = [result.check for result in results if result.check]
    worst = max(checks, key=lambda check: check.excess)
    tokens = " to ".join(f"{count:,}" for count in sorted({edge(check.num_tokens for check in checks) for edge in (min, max)}))
    others = [check.other_choices for check in checks if check.other_choices is not None]
    chosen = f"; up to {max(others):.1e} of its choices are none of fp64's" if others else ""
    return (
        f"{row.value} was checked against fp64 on {tokens} tokens: relative error at most "
        f"{worst.errors[worst.worst]:.2g}, of {worst.worst}, where plain torch in {results[0].case.config.dtype.value} has "
        f"{worst.plain[worst.worst]:.2g}; up to {max(check.left_out for check in checks):.2%} of queries, near-ties, were left out{chosen}."
    )


def _names(results: Sequence[Result]) -> str:
    return ", ".join(f"{result.row.value} {label(result.case)} at {short_count(result.case.num_tokens)}" for result in results)


def _ratio_table(results: Sequence[Result]) -> str:
    """What documents and inputs cost: each row against the same on one document, and against the same on random inputs."""
    rows = []
    measured = {(result.row, result.case): result for result in results if result.eager}
    for (row, case), result in measured.items():
        name = list(result.eager)[-1]
        on_one = replace(case, documents=KernelDocuments.ONE, document_tokens=0)
        for other in dict.fromkeys([on_one, replace(case, inputs=KernelInputs.RANDOM)]):
            if other != case and (row, other) in measured:
                time = result.eager[name].median / measured[row, other].eager[name].median
                done = work(case, name) / work(other, name)
                kind = [f"{x.documents_label}, {x.inputs.value}" for x in (case, other)]
                texts = [short_count(case.num_tokens), str(case.attention), row.value, *kind]
                rows.append([*texts, f"{time:.3f}", f"{done:.3f}", f"{time / done:.2f}"])
    if not rows:
        return ""
    header = ["tokens", "attention", "kernel", "documents, inputs", "against", "time", "work", "time / work"]
    return "## What documents and inputs cost: ratios of time and of work, pairs seen and the gate's\n\n" + table(header, rows, texts=5)


def _parts_table(results: Sequence[Result]) -> str:
    found = [(result, parts(result)) for result in results if result.kernels and not result.case.is_full]
    if not found:
        return ""
    names = [name for name in [*PARTS, OTHER] if any(name in times for _, times in found)]
    rows = []
    for result, times in found:
        cells = [_ms(times[name]) if name in times else _NONE for name in names]
        rows.append([short_count(result.case.num_tokens), label(result.case), *cells, _ms(sum(times.values()))])
    last = list(found[0][0].eager)[-1]
    return f"## Where the time of triton goes, {last}, ms\n\n" + table(["tokens", "attention", *names, "together"], rows, texts=2)


def _token_table(results: Sequence[Result]) -> str:
    found = [result for result in results if result.row is AttentionKernel.TRITON and result.eager and not result.case.is_full]
    if not found:
        return ""
    passes = list(found[0].eager)
    header = ["attention", "tokens", *(f"{name}, ns/token" for name in passes), "gate, kFLOP/token", "gate, ns/token", "gate, TFLOP/s"]
    rows = []
    for result in sorted(found, key=lambda result: (result.case.attention.block_size, result.case.attention.topk, label(result.case))):
        tokens, flops, gate = result.case.num_tokens, gate_flops(result.case), parts(result).get("gate")
        row = [label(result.case), short_count(tokens), *(f"{result.eager[name].median / tokens * 1e6:.1f}" for name in passes)]
        measured = [f"{gate / tokens * 1e6:.1f}", f"{flops / gate / 1e9:.0f}"] if gate else [_NONE, _NONE]
        rows.append([*row, f"{flops / tokens / 1e3:,.0f}", *measured])
    return "## Time per token of triton beside its gate, which alone grows with the length\n\n" + table(header, rows, texts=1)


def series(results: Sequence[Result]) -> dict[str, list[Line]]:
    """By pass, the lines of a figure: kernel, attention and their (tokens, ms); the floor is a kernel of its own."""
    panels: dict[str, list[Line]] = {}
    for name in PASSES:
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for result in sorted(results, key=lambda result: result.case.num_tokens):
            case, least = result.case, floor(result.case, name, results) if has_floor(result.case) else None
            if name in result.eager:
                lines.setdefault((result.row.value, label(case)), []).append((case.num_tokens, result.eager[name].median))
            if least is not None:
                floor_of = label(replace(case, inputs=KernelInputs.RANDOM))  # the same for all
                lines.setdefault(("floor", floor_of), []).append((case.num_tokens, least))
        if lines:
            panels[name] = [(kernel, attention, sorted(set(points))) for (kernel, attention), points in lines.items()]
    return panels


def _spread(timing: Timing | None) -> str:
    return f"{_ms(timing.median)} ({_ms(min(timing.samples))} to {_ms(max(timing.samples))})" if timing else _NONE


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.01 else f"{value:.1g}"


def to_csv(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """A line for each result: what was measured, times in ms, memory in bytes, errors; `facts` at the end of each."""
    lines = [_values(result, results) | dict(facts) for result in results]
    text = io.StringIO()
    columns = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _values(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    case, config = result.case, result.case.config
    moba = case.attention if case.attention != FULL else None
    values: dict[str, Any] = {
        "tokens": case.num_tokens,
        "block_size": moba.block_size if moba else None,
        "topk": moba.topk if moba else None,
        "kernel": result.row.value,
        "problem": result.problem,
        "documents": case.documents_label,
        "num_documents": len(case.lengths),
        "inputs": case.inputs.value,
        "dtype": config.dtype.value,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "seed": config.seed,
        "tokens_per_second": tokens_per_second(result) if result.eager else None,
    }
    for prefix, name in {"forward": FORWARD, "both": BOTH}.items():
        for mode, times in {"": result.eager, "graph_": result.graph}.items():
            samples = times[name].samples if name in times else ()
            summary = (times[name].median, min(samples), max(samples), len(samples)) if samples else (None,) * 4
            values |= {f"{prefix}_{mode}{key}": value for key, value in zip(("ms", "least_ms", "most_ms", "calls"), summary)}
        values[f"{prefix}_peak_bytes"] = result.peak.get(name)
        least = floor(case, name, results) if has_floor(case) and name in result.eager else None
        values[f"{prefix}_floor_ms"] = least
        values[f"{prefix}_efficiency"] = least / result.eager[name].median if least is not None else None
    dense = dense_of(case, results) if has_floor(case) else None
    values |= {"floor_rate_tokens": dense.case.num_tokens if dense else None, "no_graph": result.no_graph}
    values |= {f"part_{name}_ms": parts(result).get(name) for name in [*PARTS, OTHER]}
    check = result.check
    values |= {"check_tokens": check.num_tokens if check else None, "check_left_out": check.left_out if check else None}
    values |= {"check_other_choices": check.other_choices if check else None}
    for name in NAMES:
        errors, plain = (check.errors, check.plain) if check else ({}, {})
        values |= {f"error_{name}": errors.get(name), f"plain_error_{name}": plain.get(name)}
    return values
