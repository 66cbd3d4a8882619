"""Shared windows of held-out and training documents, against sets of tuples."""

import random
from collections import Counter

import pytest

import data.contamination
from data.contamination import WINDOW, contamination
from data.prepare import prepare
from data.shards import Corpus
from tests.data.conftest import make_texts


@pytest.fixture
def corpus(jsonl_config):
    """Documents of which many quote others, some from their first token to their last."""
    rng = random.Random(1)
    plain = make_texts(60)
    quoting = []
    for i in range(40):
        source = rng.choice(plain)
        start = rng.randrange(len(source))
        quoting.append(f"quotes {i} " + source[start : start + rng.randint(1, 400)])
    config = jsonl_config(plain + quoting, heldout_fraction=0.3, shard_tokens=3000)
    prepare(config)
    return Corpus.open(config.prepared_dir)


def windows(corpus, split):
    table = corpus.split(split)
    found = []
    for document in range(table.num_documents):
        tokens = table.tokens(document)[1:-1].tolist()
        found.append([tuple(tokens[i : i + WINDOW]) for i in range(len(tokens) - WINDOW + 1)])
    return found


@pytest.mark.parametrize(("strip", "held"), [(1 << 20, 1 << 26), (100, 1 << 26), (700, 500)])
def test_it_finds_what_sets_of_windows_find(corpus, monkeypatch, strip, held):
    monkeypatch.setattr(data.contamination, "_STRIP", strip)
    monkeypatch.setattr(data.contamination, "_HELDOUT_WINDOWS", held)
    reported = []
    found = contamination(corpus, lambda *progress: reported.append(progress))
    first: dict[tuple, int] = {}
    for document, of_document in enumerate(windows(corpus, "train")):
        for window in of_document:
            first.setdefault(window, document)
    heldout = windows(corpus, "heldout")
    shared = [sum(window in first for window in of_document) for of_document in heldout]
    assert {item.document: item.shared for item in found.documents} == {d: n for d, n in enumerate(shared) if n}
    assert (found.num_documents, found.shared, found.windows) == (len(heldout), sum(shared), sum(map(len, heldout)))
    assert len(found.documents) > 5 and any(n == 0 for n in shared)
    for item in found.documents:
        hits = [window in first for window in heldout[item.document]]
        begin, count = item.at - 1, item.length - WINDOW + 1
        assert item.windows == len(hits) and all(hits[begin : begin + count])
        runs = Counter(len(run) for run in "".join("x" if hit else " " for hit in hits).split())
        assert count == max(runs)
        assert item.training_document == first[heldout[item.document][begin]]
    shares = [item.shared / item.windows for item in found.documents]
    assert shares == sorted(shares, reverse=True)
    done, total = zip(*reported, strict=True)
    assert list(done) == sorted(done) and done[-1] == total[-1] and len(set(total)) == 1


def test_without_heldout_documents_there_is_nothing_to_find(jsonl_config):
    config = jsonl_config(make_texts(5), heldout_fraction=0.0)
    prepare(config)
    found = contamination(Corpus.open(config.prepared_dir))
    assert (found.documents, found.num_documents, found.windows) == ([], 0, 0)
