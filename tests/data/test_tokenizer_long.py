"""Long texts, encoded in stretches: every text comes back, and where a cut is clean the tokens are those of the uncut text."""

import io
import random
import re

import pytest
from sentencepiece import SentencePieceTrainer

import data.tokenizer
from data.tokenizer import load_tokenizer, stretches
from tests.data.conftest import make_texts

LONG = "\n".join(make_texts(40))


@pytest.fixture
def short_stretches(monkeypatch):
    """The plain encoding of a text, and from here on stretches of at most 300 characters."""
    monkeypatch.setattr(data.tokenizer, "_STRETCH_CHARACTERS", 300)


def uncut(tokenizer, text):
    return tokenizer.encode_stretch(text, begins=True)


@pytest.fixture(scope="module")
def spaced_file(tmp_path_factory):
    """A sentencepiece model that puts a space before every text, as Llama 2's does."""
    model = io.BytesIO()
    lines = iter(line for text in make_texts(60, seed=9) for line in text.split("\n"))
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=384, byte_fallback=True, add_dummy_prefix=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", num_threads=1, minloglevel=3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spaced") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory):
    """A byte-level BPE with GPT-2's way of cutting words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(make_texts(60, seed=9), trainer)
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    model.save(str(path))
    return path


FILES = ["model_file", "spaced_file", "byte_level_file"]


@pytest.mark.parametrize("file", FILES)
def test_cut_at_line_ends_the_tokens_are_those_of_the_uncut_text(file, request, short_stretches):
    tokenizer = load_tokenizer(request.getfixturevalue(file))
    text = re.sub(r"\s*\n\s*", "\n", LONG)
    assert len(list(stretches(text))) > 50
    assert tokenizer.encode(text) == uncut(tokenizer, text)


ALPHABETS = ["ab", "ab ", " \n", "a\n", "\r\n\t ", "é漢😀 ", "\u2581 a", "\0\ufeff\u0301x"]
# A model that puts a space before every text reads U+2581 as a space, however short the text.
PAIRS = [(file, alphabet) for file in FILES for alphabet in ALPHABETS if "spaced" not in file or "\u2581" not in alphabet]


@pytest.mark.parametrize(("file", "alphabet"), PAIRS)
def test_every_long_text_comes_back(file, alphabet, request, short_stretches):
    tokenizer = load_tokenizer(request.getfixturevalue(file))
    rng = random.Random(alphabet)
    for length in (0, 1, 299, 300, 301, 1000, 3000):
        text = "".join(rng.choices(alphabet, k=length))
        parts = list(stretches(text))
        assert "".join(parts) == text and all(len(part) <= 300 for part in parts)
        assert all(len(part) >= 150 for part in parts[:-1])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_that_fit_are_encoded_in_one_call(model_file):
    tokenizer = load_tokenizer(model_file)
    assert list(stretches(LONG)) == [LONG] and tokenizer.encode(LONG) == uncut(tokenizer, LONG)
