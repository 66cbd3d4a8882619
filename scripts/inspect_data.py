"""Look into a prepared corpus: `python -m scripts.inspect_data FOLDER`.

    document=12 split=heldout            decode document 12 of the held-out ones
    document=12 tokens=1000..1200        tokens 1000 to 1199 of it
    tokens=1000..1200                    those of the whole split, document after document
    mix.packing=best_fit seq_len=32768   what a stage under a mix trains on: sources, epochs, share of long documents, padding
    contamination=true                   13-grams of tokens that held-out documents share with training documents
    verify=true                          compare every file with its checksum

Prints the manifest, documents and tokens by source, the histogram of lengths, the share of tokens in long documents and, per reason, what
was left out; writes the histogram as a PNG into output_dir. With document or tokens it prints these alone.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # started by its path: the folder of this file would shadow top-level packages, the root would be missing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from rich.console import Console
from rich.progress import Progress

from configs.registry import command, show
from configs.schema import ConfigError, InspectConfig, MixConfig
from data.contamination import WINDOW, contamination
from data.documents import describe_left_out
from data.loader import require_documents
from data.manifest import SPLITS
from data.mix import LONG
from data.mix import report as mix_report
from data.shards import Corpus, DocumentTable, length_histogram
from scripts.figures import plot_lengths, short_count
from scripts.program import first_word_is, run

_SHOWN = 10  # contaminated documents
_EXCERPT = 100  # characters


def main() -> None:
    """Takes the folder, the first word, off the command line; the rest is its config."""
    first_word_is("prepared_dir")
    report()


@command(InspectConfig, config_name="inspect_data")
def report(config: InspectConfig) -> None:
    """Prints what was asked for."""
    corpus = Corpus.open(config.prepared_dir, verify=True if config.verify else None)
    if config.document >= 0 or config.tokens:
        show(excerpt(corpus, config))
        return
    training = [] if config.mix == MixConfig() else list(trained_on(corpus, config))
    figure = _draw(corpus, Path(config.output_dir))
    lines = [*summary(corpus), *training, *(["every file matches its checksum"] if config.verify else []), str(figure)]
    if config.contamination:
        lines += ["", *contaminated(corpus)]
    show("\n".join(lines))


def excerpt(corpus: Corpus, config: InspectConfig) -> str:
    """The text of a document, or of a range of tokens in it or in the split, under a line that says what it is. Raises ConfigError."""
    table = corpus.split(config.split)
    if config.document >= table.num_documents:
        raise ConfigError(f"document={config.document}: the {config.split} split has {table.num_documents} documents, counted from 0")
    whole = int(table.lengths[config.document]) if config.document >= 0 else table.num_tokens
    first, stop = (int(number) for number in config.tokens.split("..")) if config.tokens else (0, whole)
    if stop > whole:
        of = f"document {config.document}" if config.document >= 0 else f"the {config.split} split"
        raise ConfigError(f"tokens={config.tokens}: {of} has {whole:,} tokens")
    pieces = [(config.document, first, stop)] if config.document >= 0 else _pieces(table, first, stop)
    shown = []
    for document, start, end in pieces:
        where = f"source {table.source(document)}, tokens {start:,}..{end:,} of {table.lengths[document]:,}"
        text = corpus.tokenizer.decode(table.tokens(document, start, end))
        shown.append(f"--- {config.split} document {document}, {where}, text {table.text_hash(document)}\n{text}")
    return "\n".join(shown)


def _pieces(table: DocumentTable, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(document, first, stop) of the documents that hold tokens [first, stop) of the split."""
    ends = np.cumsum(table.lengths)
    for document in range(int(np.searchsorted(ends, first, side="right")), table.num_documents):
        begin = int(ends[document] - table.lengths[document])
        if begin >= stop:
            return
        yield document, max(0, first - begin), min(stop, int(ends[document])) - begin


def summary(corpus: Corpus) -> Iterator[str]:
    """The manifest in words, and the histogram of lengths."""
    manifest = corpus.manifest
    made = manifest.config["tokenizer"]
    yield f"{corpus.folder}: format {manifest.format_version}, tokens as {np.dtype(manifest.dtype).name}"
    yield f"tokenizer: {manifest.tokenizer_file} ({made['kind']}), {manifest.vocab_size:,} tokens, hash {manifest.tokenizer_hash}"
    yield f"held out: {manifest.config['heldout_fraction']:.3g} of the documents, by the hash of their text"
    for split in SPLITS:
        counts = manifest.splits[split]
        yield (
            f"{split:8} {counts.documents:>10,} documents {counts.tokens:>15,} tokens {counts.bytes / 1e6:>10,.1f} MB of text, longest "
            f"{counts.longest:,} tokens, {len(counts.shards):,} shards"
        )
        for source, part in counts.by_source.items():
            share = part["tokens"] / counts.tokens if counts.tokens else 0.0
            yield f"  {source:20} {part['documents']:>10,} documents {part['tokens']:>15,} tokens {share:>7.1%}"
    for reason, count in manifest.dropped.items():
        if count:
            yield f"left out: {describe_left_out(reason, count, manifest.dropped_names.get(reason, []))}"
    lengths = {split: corpus.split(split).lengths for split in SPLITS}
    yield "tokens in documents of at least " + ", ".join(
        f"{short_count(least)}: " + " ".join(f"{_share(lengths[split], least):.1%} {split}" for split in SPLITS if len(lengths[split]))
        for least in LONG
    )
    bins = {split: {low: entry for low, *entry in length_histogram(lengths[split])} for split in SPLITS}
    yield f"{'length':>16} " + " ".join(f"{f'{split} documents':>18} {'tokens':>15}" for split in SPLITS) + "  share of train tokens"
    for low in sorted(set().union(*bins.values())):
        counted = [bins[split].get(low, [0, 0]) for split in SPLITS]
        share = counted[0][1] / max(1, manifest.splits["train"].tokens)
        figures = " ".join(f"{documents:>18,} {tokens:>15,}" for documents, tokens in counted)
        yield f"{f'{low:,}..{2 * low - 1:,}':>16} {figures}  {share:>5.1%} {'#' * round(40 * share)}"


def trained_on(corpus: Corpus, config: InspectConfig) -> Iterator[str]:
    """What a stage under `config.mix` will have read. Raises ConfigError where the corpus does not have what it asks for."""
    table = corpus.split("train")
    require_documents(corpus, table)
    tokens = config.training_tokens or table.num_tokens
    found = mix_report(table, config.mix, tokens=tokens, seq_len=config.seq_len)
    packing = f"{config.mix.packing.value}, {found.padding:.1%} padding"
    yield f"{tokens:,} training tokens under this mix, in rows of {config.seq_len:,} ({packing})"
    for pool in found.pools:
        yield (
            f"  {pool.name:20} {pool.documents:>10,} documents {pool.tokens:>15,} tokens {pool.share:>7.1%} of training, "
            f"{pool.epochs:.3g} epochs"
        )
    yield "  from documents of at least " + ", ".join(f"{short_count(least)}: {share:.1%}" for least, share in found.long.items())


def contaminated(corpus: Corpus) -> Iterator[str]:
    """The held-out documents that share 13-grams of tokens with training documents, the worst first."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("windows of training documents", total=None)
        found = contamination(corpus, lambda done, total: bar.update(task, completed=done, total=total))
    share = found.shared / found.windows if found.windows else 0.0
    yield (
        f"contamination: {len(found.documents):,} of {found.num_documents:,} held-out documents share windows of {WINDOW} tokens with "
        f"training documents; {found.shared:,} of {found.windows:,} windows ({share:.2%})"
    )
    for least in (0.1, 0.5, 0.9):
        many = sum(item.shared >= least * item.windows for item in found.documents)
        yield f"  {many:,} documents share at least {least:.0%} of their windows"
    table = corpus.split("heldout")
    for item in found.documents[:_SHOWN]:
        text = corpus.tokenizer.decode(table.tokens(item.document, item.at, item.at + item.length))
        yield (
            f"  heldout document {item.document}: {item.shared / item.windows:.1%} of {item.windows:,} windows; longest {item.length:,} "
            f"tokens from {item.at:,}, as in train document {item.training_document}: {' '.join(text.split())[:_EXCERPT]!r}"
        )


def _share(lengths: np.ndarray, least: int) -> float:
    return float(lengths[lengths >= least].sum() / max(1, lengths.sum()))


def _draw(corpus: Corpus, folder: Path) -> Path:
    """The histogram of lengths as a PNG. Raises ConfigError where it cannot be written."""
    name = corpus.folder.resolve().name
    path = folder / f"{name}-lengths.png"
    panels = {split: bins for split in SPLITS if (bins := length_histogram(corpus.split(split).lengths))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot_lengths(path, f"{name}: {corpus.manifest.splits['train'].tokens:,} training tokens", panels)
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: cannot be written ({error.strerror})") from None
    return path


if __name__ == "__main__":
    run(main, interrupted="the corpus is as it was")
