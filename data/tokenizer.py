"""One door to tokenizers: sentencepiece `tokenizer.model` and Hugging Face `tokenizer.json`.

Text never turns into a separator: `<s>` written in a document is encoded as the characters it is made of.
A long text is encoded in stretches, so that memory stays bounded and several processes can share it. The stretches' tokens give back
the text exactly wherever the tokenizer does so for a short one; a token that would have crossed a cut is two.
"""

import hashlib
import io
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from configs.model_file import read_json
from configs.schema import ConfigError, TokenizerKind

FILE_NAMES = {"tokenizer.model": TokenizerKind.SENTENCEPIECE, "tokenizer.json": TokenizerKind.HUGGINGFACE}
# What released models keep with their tokenizer: how it is set up, chats are written and text is generated.
_COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "generation_config.json"),
)
_STRETCH_CHARACTERS = 1 << 18  # encoded at once: sentencepiece holds some 200 bytes a character
_SPACE = "\u2581"  # sentencepiece's own mark for a space
_KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "[CLS]")
_KNOWN_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]", "[SEP]")


class Tokenizer(ABC):
    """Text to ids and back, with the ids of the two document separators.

    `hash` is the blake2b digest of the tokenizer's file (hex); `vocab_size` is one more than the highest id.
    A tokenizer that has only one separator uses it at both ends of a document.
    """

    file_name: str
    hash: str
    vocab_size: int
    bos_id: int
    eos_id: int

    _joint = 0

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without separators."""
        return [i for number, part in enumerate(stretches(text)) for i in self.encode_stretch(part, begins=number == 0)]

    def encode_stretch(self, part: str, *, begins: bool) -> list[int]:
        """Ids of one of the `stretches` of a text; `begins` says whether it is the first."""
        if begins or not self._joint:
            return self._encode(part)
        return self._encode(f"\n{part}")[self._joint :]

    def _learn_joint(self) -> None:
        """Finds out how a text goes on: a model that puts a space before every text must not put one before a later stretch.

        Such a model encodes the stretch behind a line end, whose `_joint` tokens are then dropped.
        """
        letter, line_end = self._encode("a"), self._encode("\n")
        if self.decode([*letter, *letter]) != "aa" and self._encode("\na")[: len(line_end)] == line_end:
            self._joint = len(line_end)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of `text` in one call of the library."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; separators vanish."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """A `tokenizer_config.json` under which transformers reads the file as we do, with the bos before each text."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, where: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except (RuntimeError, OSError):
            raise ConfigError(f"{where}: not a sentencepiece model") from None
        self.hash = content_hash(content)
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = _separators(self._model.bos_id(), self._model.eos_id(), where)
        # Sentencepiece writes a space as U+2581 and reads that character back as a space. Where the model has bytes and adds no
        # space of its own, the character goes through its three bytes, and every text comes back as it went in.
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        plain = not self._model.encode("a", out_type=str)[:1][0].startswith(_SPACE)
        self._mark = mark if plain and all(map(self._model.is_byte, mark)) else None
        self._learn_joint()

    def _encode(self, text: str) -> list[int]:
        if self._mark is None or _SPACE not in text:
            return self._model.encode(text)
        first, *rest = self._model.encode(text.split(_SPACE))
        for part in rest:
            first += self._mark + part
        return first

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def settings(self) -> dict[str, Any]:
        starts_with_space = self._model.encode("a", out_type=str)[:1][0].startswith(_SPACE)
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._model.unk_id()}
        pieces = {key: self._model.id_to_piece(number) for key, number in names.items()}
        fixed = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "clean_up_tokenization_spaces": False}
        return {**fixed, "add_bos_token": True, "add_eos_token": False, "add_prefix_space": starts_with_space, **pieces}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library; separators from the `tokenizer_config.json` beside it, else by their usual names."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes, where: str, settings: dict) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._model = Backend.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{where}: not a Hugging Face tokenizer ({str(error).splitlines()[0]})") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # a document's `<s>` is text
        self.hash = content_hash(content)
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        bos, eos = (_named(vocabulary, settings.get(key), known) for key, known in (("bos_token", _KNOWN_BOS), ("eos_token", _KNOWN_EOS)))
        self.bos_id, self.eos_id = _separators(bos, eos, where)
        self._learn_joint()

    def _encode(self, text: str) -> list[int]:
        return self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids  # fast: without the places of the tokens

    def decode(self, ids: Iterable[int]) -> str:
        separators = {self.bos_id, self.eos_id}
        return self._model.decode([int(i) for i in ids if int(i) not in separators], skip_special_tokens=False)

    def settings(self) -> dict[str, Any]:
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        tokens = {key: self._model.id_to_token(number) for key, number in names.items()}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}


def stretches(text: str) -> Iterator[str]:
    """`text` in parts of at most 2^18 characters (one part where it is shorter), cut where tokens hardly ever cross.

    That is, in the second half of a part: behind the last line end that stands between two characters that are no spaces, else
    behind the last line end, else before the last space, else at the full length.
    """
    start = 0
    while len(text) - start > _STRETCH_CHARACTERS:
        middle, end = start + _STRETCH_CHARACTERS // 2, start + _STRETCH_CHARACTERS
        last = at = text.rfind("\n", middle, end)
        while at > middle and (text[at - 1].isspace() or text[at + 1].isspace()):
            at = text.rfind("\n", middle, at)
        if at > middle:
            cut = at + 1
        elif last >= 0:
            cut = last + 1
        else:
            space = text.rfind(" ", middle, end)
            cut = space if space > start else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in file `path`, or the `tokenizer.model` / `tokenizer.json` in folder `path`. Raises ConfigError, `path` first."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise ConfigError(f"{path}: the folder holds neither {' nor '.join(FILE_NAMES)}")
        path = found[0]
    try:
        content = path.read_bytes()
        if path.suffix != ".json":
            return SentencePieceTokenizer(content, str(path))
        beside = path.with_name("tokenizer_config.json")
        settings = beside.read_bytes() if beside.is_file() else b"{}"
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; needs a tokenizer.model or a tokenizer.json") from None
    return HuggingFaceTokenizer(content, str(path), _settings(settings, path))


def tokenizer_hashes(folder: Path) -> list[str]:
    """The hash of each tokenizer file that lies in `folder`: a released model may bring both forms."""
    return [content_hash((folder / name).read_bytes()) for name in FILE_NAMES if (folder / name).is_file()]


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies the tokenizer in `source` with all that goes with it into the folder `target`; the names of the files. Raises ConfigError
    naming one that says it is JSON and holds no object, before anything is copied."""
    names = [name for name in (*FILE_NAMES, *_COMPANIONS) if (source / name).is_file()]
    for name in names:
        if name.endswith(".json"):
            read_json(source / name)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _settings(content: bytes, path: Path) -> dict:
    try:
        settings = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{path}: the tokenizer_config.json beside it is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: the tokenizer_config.json beside it is a {type(settings).__name__}, not an object")
    return settings


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """A sentencepiece BPE with byte fallback that gives back every text exactly; the same bytes for the same `texts`.

    `texts` are pieces of at most a few thousand characters. Raises ConfigError where they support fewer than `vocab_size` tokens or
    their characters alone need more.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    # The trainer takes lines and refuses NUL, which byte fallback serves. One thread: the model file records their number.
    lines = (line for text in texts for line in text.split("\n") if line and "\0" not in line)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 16,
            num_threads=1,
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"data.tokenizer.vocab_size={vocab_size}: {_training_problem(str(error))}") from None
    return model.getvalue()


def _training_problem(message: str) -> str:
    """What sentencepiece's error means for the user, who can change the text and the size of the vocabulary."""
    if most := re.search(r"too high .* <= (\d+)", message):
        return f"is too high for so little text, which gives at most {most[1]} tokens"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"is too low, the characters of the text alone need {least[1]}"
    if "sentences_.empty()" in message:
        return "there is no text to learn from: no training document has a line that is neither empty nor holds NUL"
    return f"sentencepiece cannot learn it ({' '.join(message.split()) or 'no reason given'})"


def content_hash(content: bytes) -> str:
    """blake2b digest of 32 hex characters."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _named(vocabulary: dict[str, int], given: object, known: tuple[str, ...]) -> int:
    token = given.get("content") if isinstance(given, dict) else given  # older files wrap the token in an object
    candidates = (token, *known) if isinstance(token, str) else known
    return next((vocabulary[name] for name in candidates if name in vocabulary), -1)


def _separators(bos: int, eos: int, where: str) -> tuple[int, int]:
    if bos < 0 and eos < 0:
        raise ConfigError(f"{where}: has neither a begin nor an end of document token; documents need one")
    return (bos if bos >= 0 else eos), (eos if eos >= 0 else bos)
