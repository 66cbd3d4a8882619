"""Questions about long texts, after RULER (Hsieh et al., arXiv 2404.06654) but of our own making: things are hidden in held-out documents.

A prompt is one document that ends where the answer begins, as base models continue texts. It is put together from token ids:
its length is what was asked for to the token, and an answer has in the text the very tokens it has behind the question.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from configs.schema import ConfigError, RetrievalTask, SuiteConfig
from data.shards import Corpus

_KEYS = 4  # codes that multi_key hides; one is asked for
_VALUES = 4  # codes that multi_value hides, all of one name
_CHAIN = 5  # names of one value in variable_tracking
_COMMON, _COMMON_TIMES = 5, 10  # words of common_words that are asked for, and how many times as often as the others they occur
_FREQUENT, _CODED = 3, 12  # words of frequent_words that are asked for, and of all that are strewn
_LEAST_OTHERS = 10  # words in the list of common_words besides
_SLACK = 8  # tokens that a written answer may be longer than the longest candidate
_VOCABULARY_TOKENS, _LEAST_WORDS = 1 << 20, 32  # held-out text that words are taken from, and how many it must have

Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and what is expected after it."""

    task: RetrievalTask
    context: int
    """Tokens that prompt and answer may have together."""
    depth: float | None
    """Where a needle lies, from 0 to 1; None in other tasks."""
    prompt: np.ndarray
    """Ids int32 `[n]`, from the bos on; `context - room` of them (in common_words up to a word less)."""
    room: int
    """Tokens that are left for the answer."""
    answers: tuple[str, ...]
    """What a written answer must hold."""
    candidates: tuple[Ids, ...]
    """Answers to rank, the right one first."""


def make_samples(corpus: Corpus, suite: SuiteConfig, contexts: Sequence[int]) -> list[Sample]:
    """The samples of each task at each context length (and, of needles, at each depth), the same for the same seed.

    Raises ConfigError where a prompt does not fit in a context, or held-out documents do not fill it.
    """
    writer = _Writer(corpus, suite)
    samples = []
    for context, task in itertools.product(contexts, suite.tasks):
        depths = suite.depths if task is RetrievalTask.NEEDLE else (None,)
        for number, (depth, _) in enumerate(itertools.product(depths, range(suite.samples))):
            seeds = [suite.seed, context, list(RetrievalTask).index(task), number]
            samples.append(writer.write(task, context, depth, np.random.default_rng(seeds)))
    return samples


class _Writer:
    """Writes samples with the held-out documents of a corpus and its tokenizer."""

    def __init__(self, corpus: Corpus, suite: SuiteConfig) -> None:
        self._folder, self._table, self._tokenizer = corpus.folder, corpus.split("heldout"), corpus.tokenizer
        self._distractors = suite.distractors
        self._breaking: dict[int, bool] = {}
        if len(self._words) < _LEAST_WORDS:
            raise ConfigError(
                f"data.prepared_dir={corpus.folder}: its held-out documents have {len(self._words)} words; retrieval needs more"
            )

    def write(self, task: RetrievalTask, context: int, depth: float | None, rng: np.random.Generator) -> Sample:
        """One sample. Raises ConfigError where it does not fit in `context` tokens."""
        write: dict[RetrievalTask, Callable[[_Draft], None]] = {
            RetrievalTask.NEEDLE: self._needle,
            RetrievalTask.MULTI_KEY: self._multi_key,
            RetrievalTask.MULTI_VALUE: self._multi_value,
            RetrievalTask.VARIABLE_TRACKING: self._variable_tracking,
            RetrievalTask.COMMON_WORDS: self._common_words,
            RetrievalTask.FREQUENT_WORDS: self._frequent_words,
        }
        draft = _Draft(task=task, context=context, depth=depth, rng=rng)
        write[task](draft)
        intro = [self._tokenizer.bos_id, *self._tokenizer.encode(draft.intro)]
        question = self._spell(draft.question)
        candidates = tuple(self._spell(text) for text in draft.candidates)
        room = max(map(len, candidates)) + _SLACK
        needed = len(intro) + len(question) + room
        body = self._list_words(draft, context - needed) if draft.others else self._weave(draft, context - needed, needed)
        prompt = np.concatenate([np.array(intro, np.int32), body, np.array(question, np.int32)])
        return Sample(
            task=task, context=context, depth=depth, prompt=prompt, room=room, answers=tuple(draft.answers), candidates=candidates
        )

    # The tasks

    def _needle(self, draft: "_Draft") -> None:
        (name,), (code, *others) = self._names(draft.rng, 1), _codes(draft.rng, 1 + self._distractors)
        self._hide_codes(draft, [(name, code)], [draft.depth or 0.0])
        self._ask_for_code(draft, name, [code, *others])

    def _multi_key(self, draft: "_Draft") -> None:
        names, codes = self._names(draft.rng, _KEYS), _codes(draft.rng, _KEYS + self._distractors)
        self._hide_codes(draft, list(zip(names, codes)), draft.rng.random(_KEYS).tolist())
        self._ask_for_code(draft, names[0], codes[: 1 + self._distractors])  # the other codes of the text first

    def _multi_value(self, draft: "_Draft") -> None:
        (name,) = self._names(draft.rng, 1)
        lists = [_codes(draft.rng, _VALUES) for _ in range(1 + self._distractors)]
        self._hide_codes(draft, [(name, code) for code in lists[0]], sorted(draft.rng.random(_VALUES)))
        draft.question = f"\n\nThe codes of {name} are"
        draft.answers, draft.candidates = lists[0], [f" {', '.join(codes)}" for codes in lists]

    def _variable_tracking(self, draft: "_Draft") -> None:
        """Two chains of names, each name standing for the one before it; asked for are those that stand for the first one's value."""
        chosen = draft.rng.choice(26**4, 2 * _CHAIN, replace=False)
        names = ["".join(chr(65 + number // 26**place % 26) for place in range(4)) for number in chosen.tolist()]
        chains, values = (names[:_CHAIN], names[_CHAIN:]), _codes(draft.rng, 2)
        for chain, value in zip(chains, values):
            for depth, name, meaning in zip(sorted(draft.rng.random(_CHAIN)), chain, [value, *chain]):
                draft.pieces.append((depth, self._spell("\nLet", f" {name}", " be", f" {meaning}", ".\n")))
        draft.intro = "Names in the text below stand for numbers, or for other names.\n\n"
        draft.question = f"\n\nThe names that stand for {values[0]} are"
        others = draft.rng.choice(2**_CHAIN - 1, self._distractors, replace=False) + 1  # which of the names are of the other chain
        lists = [[chains[pick >> place & 1][place] for place in range(_CHAIN)] for pick in [0, *others.tolist()]]
        draft.answers, draft.candidates = lists[0], [f" {', '.join(answer)}" for answer in lists]

    def _common_words(self, draft: "_Draft") -> None:
        words = [str(word) for word in draft.rng.permutation(self._words)]
        draft.common, draft.others = words[:_COMMON], words[_COMMON:]
        draft.intro = "Here is a list of words, of which some occur more often than others.\n\n"
        draft.question = f"\n\nThe {_COMMON} words that occur most often are"
        wrong = (draft.rng.permutation(words[_COMMON : 3 * _COMMON])[:_COMMON].tolist() for _ in range(self._distractors))
        lists: list[list[str]] = [draft.common, *wrong]
        draft.answers, draft.candidates = draft.common, [f" {', '.join(answer)}" for answer in lists]

    def _frequent_words(self, draft: "_Draft") -> None:
        """Words of no language, the r-th of them 1/r times as often as the first."""
        words: dict[str, None] = {}
        while len(words) < _CODED:
            words["".join(str(draft.rng.choice(list(letters))) for letters in ("bdfgklmnprstvz", "aeiou") * 3)] = None
        ranked = list(words)
        first = _CODED * math.ceil(draft.context / 8192)
        for rank, word in enumerate(ranked, start=1):
            piece = self._spell(" [", word, "]")
            draft.pieces += [(depth, piece) for depth in draft.rng.random(first // rank)]
        draft.intro = "Words in brackets, which mean nothing, are strewn over the text below.\n\n"
        draft.question = f"\n\nThe {_FREQUENT} words in brackets that occur most often are"
        wrong = [pick for pick in itertools.combinations(range(_CODED), _FREQUENT) if pick != tuple(range(_FREQUENT))]
        picks = [wrong[number] for number in draft.rng.choice(len(wrong), self._distractors, replace=False)]
        lists = [ranked[:_FREQUENT], *([ranked[rank] for rank in pick] for pick in picks)]
        draft.answers, draft.candidates = lists[0], [f" {', '.join(answer)}" for answer in lists]

    def _hide_codes(self, draft: "_Draft", codes: Sequence[tuple[str, str]], depths: Sequence[float]) -> None:
        draft.intro = "Codes of names are hidden in the text below.\n\n"
        for (name, code), depth in zip(codes, depths, strict=True):
            draft.pieces.append((float(depth), self._spell(f"\nThe code of {name} is", f" {code}", ".\n")))

    def _ask_for_code(self, draft: "_Draft", name: str, candidates: Sequence[str]) -> None:
        draft.question = f"\n\nThe code of {name} is"
        draft.answers, draft.candidates = candidates[:1], [f" {code}" for code in candidates]

    # The text

    def _spell(self, *parts: str) -> Ids:
        """Ids of parts of a text that go on from each other, each encoded by itself."""
        return [number for part in parts for number in self._tokenizer.encode_stretch(part, begins=False)]

    def _weave(self, draft: "_Draft", free: int, needed: int) -> np.ndarray:
        """`free` tokens of held-out text in which the pieces lie at their depths, at the end of a line or sentence where there is one."""
        inserted = sum(len(piece) for _, piece in draft.pieces)
        if free <= inserted:
            raise _too_short(draft, needed + inserted + 1)
        text = self._text(free - inserted, draft)
        breaks = self._breaks(text)
        woven: list[np.ndarray] = []
        begun = 0
        for depth, piece in sorted(draft.pieces, key=lambda pair: pair[0]):
            place = int(breaks[np.abs(breaks - depth * len(text)).argmin()])
            woven += [text[begun:place], np.array(piece, np.int32)]
            begun = place
        return np.concatenate([*woven, text[begun:]])

    def _list_words(self, draft: "_Draft", free: int) -> np.ndarray:
        """At most `free` tokens: the common words, and as many others as fit, in one random order; the fewer times each other word
        occurs the more of them there are."""
        common, others = ([self._spell(f" {word}") for word in words] for words in (draft.common, draft.others))
        unit = _COMMON_TIMES * sum(map(len, common))
        times = max(1, math.ceil(free / (unit + sum(map(len, others)))))
        taken = int(np.searchsorted(np.cumsum([times * len(word) for word in others]), free - times * unit, side="right"))
        if taken < _LEAST_OTHERS:
            raise _too_short(draft, draft.context - free + unit + sum(map(len, others[:_LEAST_OTHERS])))
        words = [*(common * _COMMON_TIMES), *others[:taken]] * times
        return np.concatenate([np.array(words[index], np.int32) for index in draft.rng.permutation(len(words))])

    def _text(self, num_tokens: int, draft: "_Draft") -> np.ndarray:
        """The first tokens of held-out documents in a random order, without separators, an empty line between them."""
        between = np.array(self._spell("\n\n"), np.int32)
        parts: list[np.ndarray] = []
        missing = num_tokens
        for document in draft.rng.permutation(self._table.num_documents):
            parts.append(self._table.tokens(int(document), 1, min(int(self._table.lengths[document]) - 1, 1 + missing)))
            parts.append(between[: missing - len(parts[-1])])
            missing -= len(parts[-2]) + len(parts[-1])
            if missing == 0:
                return np.concatenate(parts).astype(np.int32)
        raise ConfigError(
            f"contexts={draft.context}: the held-out documents of data.prepared_dir={self._folder} have {num_tokens - missing} tokens of "
            f"text, {draft.task.value} needs {num_tokens}; hold out more, or prepare a larger corpus"
        )

    def _breaks(self, text: np.ndarray) -> np.ndarray:
        """Where a line or a sentence has ended before the token, and the two ends of the text."""
        for number in np.unique(text).tolist():
            if number not in self._breaking:
                self._breaking[number] = self._tokenizer.decode([number]).rstrip(" ").endswith((".", "!", "?", "\n"))
        ends = np.isin(text, [number for number, breaks in self._breaking.items() if breaks])
        return np.unique([0, *(np.flatnonzero(ends) + 1), len(text)])

    @cached_property
    def _words(self) -> list[str]:
        """Words of four to nine small letters in held-out text, each once."""
        found: set[str] = set()
        missing = _VOCABULARY_TOKENS
        for document in range(self._table.num_documents):
            tokens = self._table.tokens(document, 0, missing)
            found |= set(re.findall(r"\b[a-z]{4,9}\b", self._tokenizer.decode(tokens)))
            missing -= len(tokens)
            if missing == 0:
                break
        return sorted(found)

    def _names(self, rng: np.random.Generator, count: int) -> list[str]:
        words = rng.choice(self._words, 2 * count, replace=False)
        return [f"{first}-{second}" for first, second in zip(words[::2], words[1::2])]


class _Draft:
    """What a task decides of a sample."""

    def __init__(self, *, task: RetrievalTask, context: int, depth: float | None, rng: np.random.Generator) -> None:
        self.task, self.context, self.depth, self.rng = task, context, depth, rng
        self.intro = self.question = ""
        self.pieces: list[tuple[float, Ids]] = []
        """What is hidden, and where, from 0 to 1."""
        self.common: list[str] = []
        self.others: list[str] = []
        """Words of a list, which then stands in the place of the text."""
        self.answers: Sequence[str] = ()
        self.candidates: list[str] = []


def _codes(rng: np.random.Generator, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(1_000_000 + number) for number in rng.choice(9_000_000, count, replace=False)]


def _too_short(draft: _Draft, needed: int) -> ConfigError:
    return ConfigError(
        f"contexts={draft.context}: is too short for {draft.task.value}, whose prompt and answer have {needed} tokens at least; "
        f"raise it, or leave {draft.task.value} out of suite.tasks"
    )
