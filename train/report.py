"""What an evaluation found, as plain values (`evaluation.json`) and as Markdown made from those values alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from train.evaluate import Bucket, Document, Scores

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


def markdown(report: Values) -> str:
    """`evaluation.md`."""
    documents, results, launch = report["documents"], report["results"], report["launch"]
    lengths = f"{documents['shortest']:,} to {documents['longest']:,} tokens long"
    cut = f" {documents['cut']:,} longer ones were scored up to there, their bytes counted up to there." if documents["cut"] else ""
    hybrids = {r["attention"]: r["layers"] for r in results if len(set(r["layers"])) > 1}
    commit = launch["git"]["commit"]
    parts = [
        f"# Held-out perplexity of {report['run']}, step {report['step']:,}",
        f"{documents['scored']:,} of {documents['heldout']:,} held-out documents of {report['corpus']}, {lengths}; "
        f"{documents['scored_tokens']:,} tokens scored.{cut} Trained at a context of {report['trained_context']:,} tokens "
        f"with attention {report['trained_attention']}.",
        main_table(results),
        "\n".join(f"- {rule}: layers {', '.join(layers)}" for rule, layers in hybrids.items()),
        "## Perplexity by position in the document",
        "![Perplexity by position](position.png)",
        bucket_table(results, "by_position", "position"),
        "## Perplexity by document length",
        bucket_table(results, "by_length", "tokens in document"),
        "## How",
        _CONVENTIONS,
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
