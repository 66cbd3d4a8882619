"""A corpus that is not prepared: its sources are read and tokenised as training goes on, by every rank its own share of them.

The documents of a source follow each other in their own order, one pass after the other, and are walked in groups like those of a
prepared corpus (`data.stream`), only shorter: a group begins at a document's place in the source, is held in memory, and is read again
when a run goes on inside it. Documents are held out by the hash of their text, as in preparation; those that evaluation scores are the
first of each source. Duplicates are not looked for.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.mapping import to_mapping
from configs.schema import ConfigError, DataConfig, MixConfig, SourceConfig
from data.documents import WHOLE as WHOLE_SHARE
from data.documents import LeftOut, Share, read_documents
from data.mix import WHOLE, MixedRows, PoolProgress, number_of
from data.packing import cut
from data.reading import Coming, Place, ReadAhead, Reading, Tokenised, check_parts, read_pass
from data.stream import Piece, Row, RowStream
from data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer
from data.workers import resolve_workers

SHUFFLE_TOKENS = 2**22
"""Tokens of a source and rank among which rows are shuffled: few enough to be tokenised again when a run goes on. Part of the order."""
_DECIDES = ("sources", "heldout_fraction", "invalid_utf8")  # of DataConfig, besides the tokenizer
_HELDOUT_TEXT = 2**30  # characters of each source, at most, in which held-out documents are looked for


class DocumentList:
    """Documents in memory, as `data.batch.Documents`; each with the number of its source."""

    def __init__(self, name: str, sources: Sequence[str], documents: Sequence[tuple[int, Tokenised]]) -> None:
        self.name, self.sources, self._documents = name, list(sources), [document for _, document in documents]
        self.num_documents = len(documents)
        self.lengths = np.array([len(document.tokens) for document in self._documents], np.int64)
        self.source_numbers = np.array([number for number, _ in documents], np.uint32)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, uint16 or uint32."""
        return self._documents[document].tokens[start:stop]

    def label(self, document: int) -> str:
        """A document's name in its source."""
        return self._documents[document].name


@dataclass(frozen=True)
class Start:
    """A place in a stream: `at` tokens from its beginning, in or before the document that begins at `first` and lies after `place`."""

    at: int = 0
    first: int = field(default=0, compare=False)
    place: Place = field(default=Place(), compare=False)


class LiveStream(RowStream[Start]):
    """The documents that `open_at(place)` gives. Those from `hold_from` on are in memory as far as they were asked for."""

    def __init__(self, open_at: Callable[[Place], Coming], key: tuple[int, ...]) -> None:
        super().__init__(key)
        self.beginning = Start()
        self._open_at = open_at
        self._coming: Coming | None = None
        self._first, self._before = 0, Place()  # of the first document that is held
        self._held: list[Tokenised] = []
        self._ends: list[int] = []  # of the held documents, in tokens from the stream's beginning

    def advance(self, place: Start, num_tokens: int) -> Start:
        at = place.at + num_tokens
        self._read_to(at)
        index = bisect_right(self._ends, at)
        return Start(at, *self._begin(index))

    def pieces(self, row: Row[Start]) -> list[tuple[Tokenised, int, int]]:
        """A row as tokens [start, stop) of documents, of those from `hold_from` on."""
        found = []
        for place, num_tokens in row:
            at, end = place.at, place.at + num_tokens
            self._read_to(end)
            for index in range(bisect_right(self._ends, at), bisect_left(self._ends, end) + 1):
                first, stop = self._begin(index)[0], min(end, self._ends[index])
                found.append((self._held[index], at - first, stop - first))
                at = stop
        return found

    def place_to_state(self, place: Start) -> dict[str, Any]:
        return {"at": place.at, "first": place.first, "place": place.place._asdict()}

    def place_from_state(self, state: dict[str, Any]) -> Start:
        return Start(state["at"], state["first"], Place(**state["place"]))

    def close(self) -> None:
        """Ends the reading; what is asked for later begins it anew."""
        if self._coming is not None:
            self._coming.close()
            self._coming = None

    def _begin(self, index: int) -> tuple[int, Place]:
        """Where the held document `index`, or the one after the last, begins."""
        return (self._ends[index - 1], self._held[index - 1].after) if index else (self._first, self._before)

    def hold_from(self, start: Start) -> None:
        """Lets go of what lies before `start`, where a group begins; reads on from there where that is not what is at hand."""
        index = bisect_right(self._ends, start.first)
        if self._begin(index)[0] != start.first:
            self.close()
            self._held, self._ends = [], []
            self._first, self._before = start.first, start.place
            return
        self._first, self._before = self._begin(index)
        del self._held[:index], self._ends[:index]

    def _read_to(self, at: int) -> None:
        """Holds all documents up to `at`."""
        if self._coming is None:
            self._coming = self._open_at(self._begin(len(self._held))[1])
        while self._begin(len(self._held))[0] < at:
            document = next(self._coming)
            self._ends.append(self._begin(len(self._held))[0] + len(document.tokens))
            self._held.append(document)

    def _number(self, place: Start) -> tuple[int, ...]:
        return (place.at,)

    def _group_end(self, start: Start, packing: object) -> int:
        self._read_to(start.at + SHUFFLE_TOKENS)
        return self._ends[bisect_left(self._ends, start.at + SHUFFLE_TOKENS)] - start.at

    def _cut_at_documents(self, start: Start, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._read_to(start.at + int(stops[-1]))
        ends = np.array(self._ends, np.int64) - start.at
        low, high = np.searchsorted(ends, (starts[0], stops[-1]))
        return cut(starts, stops, ends[low:high])


class StreamedCorpus:
    """The sources of `config` as they lie there, and their first held-out documents, with `heldout_tokens` or more.

    It can be sent to other ranks, which read the same files with it. Raises ConfigError for sources and tokenizers that are not there.
    """

    name = "data.sources"

    def __init__(self, config: DataConfig, *, heldout_tokens: int) -> None:
        self.config = config
        try:
            tokenizer = load_tokenizer(config.tokenizer.path)
        except ConfigError as error:
            raise ConfigError(f"data.tokenizer.path={error}") from None
        path = Path(config.tokenizer.path)
        self.folder = path if path.is_dir() else path.parent
        self.tokenizer_hash, self.vocab_size = tokenizer.hash, tokenizer.vocab_size
        if not (self.folder / tokenizer.file_name).is_file():
            raise ConfigError(f"data.tokenizer.path={path}: must be called {' or '.join(FILE_NAMES)}, as the run keeps it under that name")
        self._separators = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        self._tokenizer_file = self.folder / tokenizer.file_name
        self._dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        self.parts = {
            source.name: read_documents(source, invalid_utf8=config.invalid_utf8, left_out=LeftOut()).parts() for source in config.sources
        }
        each = -(-heldout_tokens // len(config.sources))
        heldout = [found for number in range(len(config.sources)) for found in self._first_heldout(number, tokenizer, each)]
        self._heldout = DocumentList("heldout", self.source_names, heldout)
        self._streams: dict[str, LiveStream] = {}
        self._asked: object = None

    @property
    def source_names(self) -> list[str]:
        """In the order of the config."""
        return [source.name for source in self.config.sources]

    def split(self, name: str) -> DocumentList:
        """The held-out documents: the others are known as they come."""
        assert name == "heldout"
        return self._heldout

    def _reading(self, source: SourceConfig, share: Share, *, shortest: int, longest: int, num_workers: int) -> Reading:
        return Reading(
            source=source,
            parts=self.parts[source.name],
            share=share,
            tokenizer=self._tokenizer_file,
            dtype=self._dtype,
            **self._separators,
            invalid_utf8=self.config.invalid_utf8,
            heldout_fraction=self.config.heldout_fraction,
            shortest=shortest,
            longest=longest,
            num_workers=num_workers,
        )

    @property
    def shortest(self) -> int:
        """Tokens of the shortest documents, separators counted."""
        return self.config.min_document_tokens + 2

    def _first_heldout(self, number: int, tokenizer: Tokenizer, num_tokens: int) -> Iterator[tuple[int, Tokenised]]:
        """The first held-out documents of a source that have so many tokens together, or what there are of them near its beginning."""
        characters = 0
        reading = self._reading(self.config.sources[number], WHOLE_SHARE, shortest=self.shortest, longest=0, num_workers=1)
        with closing(read_pass(reading, Place())) as documents:
            while num_tokens > 0 and characters < _HELDOUT_TEXT and (found := next(documents, None)):
                characters += len(found.document.text)
                if not found.is_heldout:
                    continue
                ids = [tokenizer.bos_id, *tokenizer.encode(found.document.text), tokenizer.eos_id]
                if len(ids) >= self.shortest:
                    num_tokens -= len(ids)
                    yield number, Tokenised(np.array(ids, self._dtype), found.document.name, found.after)

    def streams(self, seed: int, share: Share, *, shortest: int, longest: int) -> dict[str, LiveStream]:
        """The stream of each source. While the same is asked for they are the same ones, and go on from where they are."""
        asked = (seed, share, shortest, longest)
        if self._asked != asked:
            for stream in self._streams.values():
                stream.close()
            workers = self.config.num_workers or resolve_workers(0) // share.world_size
            limits = {"shortest": shortest, "longest": longest, "num_workers": max(1, workers // len(self.config.sources))}
            self._asked = asked
            self._streams = {
                source.name: LiveStream(partial(ReadAhead, self._reading(source, share, **limits)), (seed, number_of(source.name), *share))
                for source in self.config.sources
            }
        return self._streams


class LiveRows(MixedRows[Start]):
    """The rows of one rank over a streamed corpus: its sources under the weights of a mix (`configs.checks` has checked it)."""

    def __init__(self, corpus: StreamedCorpus, mix: MixConfig, *, seed: int, seq_len: int, share: Share) -> None:
        self.shortest = max(corpus.shortest, mix.min_document_tokens)
        self.longest = mix.max_document_tokens
        self._corpus = corpus
        self._live = corpus.streams(seed, share, shortest=self.shortest, longest=self.longest)
        weights = {source.name: source.weight or 1.0 for source in mix.sources} or dict.fromkeys(self._live, 1.0)
        shares = [round(WHOLE * weights.get(name, 0.0) / sum(weights.values())) for name in self._live]
        super().__init__(self._live, shares, seq_len=seq_len, packing=mix.packing)

    def take(
        self, progress: Sequence[PoolProgress[Start]], num_rows: int
    ) -> tuple[list[tuple[int, Row[Start]]], list[PoolProgress[Start]]]:
        for stream, place in zip(self._live.values(), progress, strict=True):
            stream.hold_from(place.visited.start)  # and so until these rows have been read
        return super().take(progress, num_rows)

    def identity(self) -> dict[str, Any]:
        """All that the documents depend on, and the files that have them, fit for JSON."""
        data = {key: value for key, value in to_mapping(self._corpus.config).items() if key in _DECIDES}
        data |= {"tokenizer": self._corpus.tokenizer_hash}
        limits = {"min_document_tokens": self.shortest, "max_document_tokens": self.longest}
        return {"data": data, "mix": limits, "parts": self._corpus.parts}

    def check_parts(self, before: dict[str, dict[str, int]]) -> None:
        """Raises ConfigError, naming the file, where the files are not those they were `before`."""
        for source in self._corpus.config.sources:
            if source.name in before:
                check_parts(source, before[source.name], self._corpus.parts[source.name])

    def read(self, rows: Sequence[tuple[int, Row[Start]]]) -> tuple[DocumentList, list[list[Piece]]]:
        """Rows that `take` has just given, as pieces of the documents that they hold."""
        held: dict[int, tuple[int, int, Tokenised]] = {}  # by identity: number here, number of the source
        filled = []
        for number, row in rows:
            pieces = []
            for document, start, stop in self._live[self.names[number]].pieces(row):
                index, *_ = held.setdefault(id(document), (len(held), number, document))
                pieces.append(Piece(index, start, stop))
            filled.append(pieces)
        return DocumentList("train", self.names, [(number, document) for _, number, document in held.values()]), filled

    def passes(self, progress: Sequence[PoolProgress[Start]]) -> dict[str, float]:
        """How often each source has been read up to where the group in hand begins."""
        places = [place.visited.start.place for place in progress]
        return {name: place.passes + place.share for name, place in zip(self.names, places, strict=True)}
