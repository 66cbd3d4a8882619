"""Tokenizers: every text comes back, text never makes a separator, both file kinds through one door."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ConfigError
from data.tokenizer import copy_tokenizer, load_tokenizer, tokenizer_hashes, train_tokenizer
from tests.data.conftest import make_texts

AWKWARD = [
    "",
    " ",
    "\n",
    "a\tb  c   d\r\n\r\n  e \n",
    "\n\n\n\n    if x:\n\t\treturn\n",
    "😀 é ü 漢字 \u202eabc\u2028 \ufeffx \u00a0 \u0085",
    "a\0b\0",
    "\u2581 the mark \u2581\u2581 of a space\u2581",
    "<s>text</s><unk><0x0A>",
    "x" * 5000,
    "12345 67.89",
]


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(make_texts(20), trainer)
    folder = tmp_path_factory.mktemp("huggingface")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("text", AWKWARD)
def test_trained_tokenizer_gives_back_every_text(model_file, text):
    tokenizer = load_tokenizer(model_file)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(model_file, text):
    tokenizer = load_tokenizer(model_file)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_huggingface_file_through_the_same_door(huggingface_folder, text):
    tokenizer = load_tokenizer(huggingface_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 360)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1} & set(ids)
    assert tokenizer.decode([0, *ids, 1]) == text


def test_huggingface_separators_come_from_the_settings_beside(huggingface_folder, tmp_path):
    content = json.loads((huggingface_folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": "</s>"}}))
    assert load_tokenizer(tmp_path).eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json beside it is a list, not an object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    content["added_tokens"] = []
    content["model"]["vocab"] = {
        ("!a" if key == "<s>" else "!b" if key == "</s>" else key): i for key, i in content["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="neither a begin nor an end"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_transformers_reads_both_kinds_as_we_do(kind, model_file, huggingface_folder, tmp_path):
    from transformers import AutoTokenizer

    source = model_file.parent if kind == "sentencepiece" else huggingface_folder
    ours = load_tokenizer(source)
    copied = copy_tokenizer(source, tmp_path)
    assert ours.hash in tokenizer_hashes(tmp_path) and ours.file_name in copied
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(ours.settings()))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    # But for separators written out, which it takes for what they name, and the mark that sentencepiece has for a space.
    for text in (text for text in [*AWKWARD, *make_texts(5)] if "<s>" not in text and "\u2581" not in text):
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids and theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_training_is_deterministic():
    texts = make_texts(20)
    assert train_tokenizer(texts, vocab_size=320) == train_tokenizer(texts, vocab_size=320)


@pytest.mark.parametrize(
    ("texts", "fits"),
    [
        (["a few words"], "is too high for so little text, which gives at most 284 tokens"),
        (["".join(map(chr, range(0x4E00, 0x5200)))], "is too low, the characters of the text alone need 12"),
        ([], "there is no text to learn from"),
        (["\0\0", "\0abc\n\0"], "there is no text to learn from"),
    ],
)
def test_a_vocabulary_that_the_text_does_not_give_is_named_with_one_that_it_does(texts, fits):
    with pytest.raises(ConfigError, match=rf"^data.tokenizer.vocab_size=1000: {fits}") as refusal:
        train_tokenizer(texts, vocab_size=1000)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "content"), [("tokenizer.model", b"no model"), ("tokenizer.json", b"{"), ("tokenizer.model", None)])
def test_broken_files_are_refused_by_name(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(tmp_path / name)
    if content is None:
        with pytest.raises(ConfigError, match="holds neither"):
            load_tokenizer(tmp_path)
