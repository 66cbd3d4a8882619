"""What an evaluation found, as plain values (`evaluation.json`) and as Markdown made from those values alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from model.ops.moba import GATE_STATISTICS
from train.evaluate import Bucket, Document, Gain, Scores

Values = dict[str, Any]


def describe_result(attention: str, layers: Sequence[str], context: int, scores: Scores, seconds: float) -> Values:
    """One attention setting at one context length (tokens): nats, seconds and bytes, in total and by bucket."""
    return {
        "attention": attention,
        "layers": list(layers),
        "context": context,
        "loss": scores.loss,
        "perplexity": _finite(scores.perplexity),
        "bits_per_byte": _finite(scores.bits_per_byte),
        "nats": scores.nats,
        "tokens": scores.tokens,
        "text_bytes": scores.text_bytes,
        "seconds": seconds,
        "tokens_per_second": scores.tokens / seconds,
        "by_position": _describe_buckets(scores.by_position),
        "by_length": _describe_buckets(scores.by_length),
    }


def describe_gain(context: int, gain: Gain | None) -> Values | None:
    """Gain over a `context` of so many tokens; None where there was nothing to count it on."""
    if gain is None:
        return None
    counted = {"tokens": gain.tokens, "documents": gain.documents}
    return {"from": context, "loss_from": gain.short, "loss": gain.long, "gain": gain.gain, "standard_error": gain.standard_error} | counted


def describe_documents(documents: Sequence[Document], num_heldout: int) -> Values:
    """Counts over the scored documents; lengths are in tokens as scored, separators included."""
    lengths = [len(document.tokens) for document in documents]
    return {
        "heldout": num_heldout,
        "scored": len(documents),
        "cut": sum(document.is_cut for document in documents),
        "scored_tokens": sum(lengths) - len(documents),
        "text_bytes": sum(document.text_bytes for document in documents),
        "shortest": min(lengths),
        "longest": max(lengths),
        "numbers": [document.number for document in documents],
    }


def _describe_buckets(buckets: Mapping[int, Bucket]) -> list[Values]:
    return [
        {"low": b.low, "high": b.high, "documents": b.documents, "tokens": b.tokens, "nats": b.nats, "loss": b.loss}
        | {"perplexity": _finite(b.perplexity)}
        for _, b in sorted(buckets.items())
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no infinity


def result_label(result: Values) -> str:
    """`moba(64, 3) at 2,048`: how tables and figures name a result."""
    return f"{result['attention']} at {result['context']:,}"


def main_table(results: Sequence[Values]) -> str:
    """A row for each attention setting and context length."""
    header = ["attention", "context", "loss (nats/token)", "perplexity", "bits per byte", "tokens/s"]
    rows = [
        [
            result["attention"],
            f"{result['context']:,}",
            f"{result['loss']:.4f}",
            _number(result["perplexity"]),
            _number(result["bits_per_byte"], digits=4),
            f"{result['tokens_per_second']:,.0f}",
        ]
        for result in results
    ]
    return table(header, rows)


def bucket_table(results: Sequence[Values], key: str, name: str) -> str:
    """Perplexities by `by_position` or `by_length`: a row for each bucket, a column for each result."""
    rows = []
    for buckets in zip(*(result[key] for result in results), strict=True):  # every result scored the same documents
        first = buckets[0]
        counts = [f"{first['low']:,} to {first['high'] - 1:,}", f"{first['documents']:,}", f"{first['tokens']:,}"]
        rows.append(counts + [_number(bucket["perplexity"]) for bucket in buckets])
    return table([name, "documents", "tokens", *map(result_label, results)], rows)


def gain_table(results: Sequence[Values]) -> str:
    """Gain from context of the results that have one; empty where none has."""
    header = ["attention", "context", "against", "tokens", "documents", "loss there", "loss", "gain (nats/token)"]
    rows = [
        [
            result["attention"],
            f"{result['context']:,}",
            f"{found['from']:,}",
            f"{found['tokens']:,}",
            f"{found['documents']:,}",
            f"{found['loss_from']:.4f}",
            f"{found['loss']:.4f}",
            f"{found['gain']:.4f} ± {1.96 * found['standard_error']:.4f}",
        ]
        for result in results
        if (found := result.get("gain"))
    ]
    return table(header, rows) if rows else ""


def retrieval_table(rows: Sequence[Values]) -> str:
    """A row for each task and context length, a column for each attention: written answers / right answer ranked first."""
    settings = list(dict.fromkeys(row["attention"] for row in rows))
    places = dict.fromkeys((row["task"], row["context"]) for row in rows)
    lines = []
    for task, context in places:
        here = [row for row in rows if (row["task"], row["context"]) == (task, context)]
        mine = [[row for row in here if row["attention"] == setting] for setting in settings]
        lines.append([task, f"{context:,}", f"{sum(row['samples'] for row in mine[0]):,}", *map(_answers, mine)])
    return table(["task", "context", "samples", *settings], lines)


def _answers(rows: Sequence[Values]) -> str:
    """Of one task, whose depths have equally many samples: shares of written answers and of right answers ranked first, in %."""
    first = _rate(sum(row["ranked_first"] for row in rows) / len(rows), sum(row["samples"] for row in rows))
    if rows[0]["written"] is None:
        return f"- / {first}"
    return f"{100 * sum(row['written'] for row in rows) / len(rows):.0f} / {first}"


def _rate(share: float, count: int) -> str:
    """In % with Wilson's 95 % interval of `count` draws (J. Am. Stat. Assoc. 22, 1927), which has a width where all or none succeed."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return f"{100 * share:.0f} ({100 * max(0.0, centre - half):.0f} to {100 * min(1.0, centre + half):.0f})"


def gates_table(rows: Sequence[Values]) -> str:
    """Means over the MoBA layers' heads, a row for each attention and context length that has them; empty where none has."""
    lines = []
    for row in rows:
        if row["heads"]:
            means = [[mean for layer in row["heads"][name] if layer for mean in layer] for name in GATE_STATISTICS]
            lines.append([row["attention"], f"{row['context']:,}", *(f"{sum(of) / len(of):.3f}" for of in means)])
    return table(["attention", "context", *(name.replace("_", " ") for name in GATE_STATISTICS)], lines) if lines else ""


def benchmark_table(rows: Sequence[Values]) -> str:
    """A row for each task and metric, a column for each attention."""
    settings = list(dict.fromkeys(row["attention"] for row in rows))
    lines = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        mine = {row["attention"]: row for row in rows if (row["task"], row["metric"]) == (task, metric)}
        errors = {setting: row["standard_error"] for setting, row in mine.items()}
        cells = [
            f"{mine[setting]['value']:.4f}" + (f" ± {1.96 * error:.4f}" if (error := errors[setting]) is not None else "")
            for setting in settings
        ]
        lines.append([task, metric, f"{mine[settings[0]]['questions'] or 0:,}", *cells])
    return table(["task", "metric", "questions", *settings], lines, texts=2)


def overview(report: Values) -> str:
    """The main tables of the parts that the report has."""
    parts = [
        main_table(report["results"]) if report["results"] else "",
        gain_table(report["results"]),
        retrieval_table(report["retrieval"]) if report["retrieval"] else "",
        gates_table(report["gates"]),
        benchmark_table(report["benchmarks"]) if report["benchmarks"] else "",
        not_measured(report),
    ]
    return "\n\n".join(part for part in parts if part)


def not_measured(report: Values) -> str:
    """A line for each thing that was asked for and could not be measured; empty where all was."""
    return "\n".join(f"- Not measured: {said}" for said in report["not_measured"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table that also reads well as plain text; the first `texts` columns are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.ljust(w) if i < texts else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))} |"

    rule = ["-" * width if i < texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(map(line, [header, rule, *rows]))


def _number(value: float | None, digits: int = 2) -> str:
    return "inf" if value is None else f"{value:,.{digits}f}"


_CONVENTIONS = """\
Every token of a document but its first (the separator that opens it) is scored once, in windows of at most `context` tokens that
move on by half of it: a scored token has more than half a context before it, or all there is. Perplexity is per token of this
tokenizer; bits per byte divide by the UTF-8 bytes of the text, the closing separator's loss included."""


_GAIN = """\
Losses of the same tokens, those that have at least half the context before them, in both columns; ± is a 95 % interval
over so many documents: with fewer than about ten, a hint."""

_RETRIEVAL = """\
In each cell: share of the expected answers that the model writes, in %, then the share of samples in which the right answer is likelier
a token than each of {others} wrong ones, with a 95 % interval; by chance that is {chance:.0f} %."""


def markdown(report: Values) -> str:
    """`evaluation.md`."""
    launch = report["launch"]
    settings = [*report["results"], *report["retrieval"], *report["gates"], *report["benchmarks"]]
    hybrids = {row["attention"]: row["layers"] for row in settings if len(set(row["layers"])) > 1}
    commit = launch["git"]["commit"]
    parts = [
        f"# Evaluation of {report['run']}, step {report['step']:,}",
        f"Trained at a context of {report['trained_context']:,} tokens with attention {report['trained_attention']}.",
        "\n".join(f"- {rule}: layers {', '.join(layers)}" for rule, layers in hybrids.items()),
        not_measured(report),
        *(_perplexity(report) if report["results"] else ()),
        *(_retrieval(report["retrieval"]) if report["retrieval"] else ()),
        *(_gates(report["gates"]) if report["gates"] else ()),
        *(_benchmarks(report["benchmarks"]) if report["benchmarks"] else ()),
        "## How",
        "\n".join(
            [
                f"- checkpoint: {report['checkpoint']}",
                f"- machine: {launch['machine']}; computed on {report['device']} in {report['config']['precision']}",
                f"- date: {launch['time']}, commit {commit}{' with changes' if launch['git']['dirty'] else ''}",
                f"- command: `{launch['command']}`",
            ]
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _perplexity(report: Values) -> list[str]:
    documents, results = report["documents"], report["results"]
    lengths = f"{documents['shortest']:,} to {documents['longest']:,} tokens long"
    cut = f" {documents['cut']:,} longer ones were scored up to there, their bytes counted up to there." if documents["cut"] else ""
    gains = gain_table(results)
    return [
        "## Held-out perplexity",
        f"{documents['scored']:,} of {documents['heldout']:,} held-out documents of {report['corpus']}, {lengths}; "
        f"{documents['scored_tokens']:,} tokens scored.{cut}",
        main_table(results),
        _CONVENTIONS,
        *(("### Gain from context", gains, _GAIN) if gains else ()),
        "### By position in the document",
        "![Perplexity by position](position.png)",
        bucket_table(results, "by_position", "position"),
        "### By document length",
        bucket_table(results, "by_length", "tokens in document"),
    ]


def _retrieval(rows: Sequence[Values]) -> list[str]:
    candidates = rows[0]["candidates"]
    return [
        "## Retrieval from long text",
        retrieval_table(rows),
        _RETRIEVAL.format(others=candidates - 1, chance=100 / candidates),
        "![Needle by depth and context](needle.png)" if any(row["depth"] is not None for row in rows) else "",
    ]


def _gates(rows: Sequence[Values]) -> list[str]:
    found = gates_table(rows)
    if not found:
        return ["## What the gates choose", "No document is long enough for a query that has more past blocks than it may choose."]
    meanings = "\n".join(f"- {name.replace('_', ' ')}: {meaning}" for name, meaning in GATE_STATISTICS.items())
    return ["## What the gates choose", found, f"Means over layers and heads:\n\n{meanings}", "![Gates by layer and head](gates.png)"]


def _benchmarks(rows: Sequence[Values]) -> list[str]:
    cut = {row["attention"]: row["cut_requests"] for row in rows if row["cut_requests"]}
    said = f" Longer requests lost their beginning: {', '.join(f'{count:,} under {name}' for name, count in cut.items())}." if cut else ""
    return [
        "## Benchmarks",
        benchmark_table(rows),
        f"Through lm-eval, at a context of {rows[0]['context']:,} tokens; ± is a 95 % interval where the task gives one.{said}",
    ]
