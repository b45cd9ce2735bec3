"""Raw files of every kind give their documents; 300 broken ones are counted or refused, never lost."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from lm_jax.corpus import inputs, readers
from lm_jax.corpus.config import RawConfig
from lm_jax.corpus.inputs import Found, Piece
from lm_jax.corpus.readers import Broken
from lm_jax.corpus.rules import Document
from lm_jax.errors import ConfigError, UserError
from tests.corpus.texts import prose, write_jsonl

TEXTS = ["first", "zweiter Text\nmit Zeilen", "第三", "fourth \u2028 \x00 odd", "e\u0301"] + [
    f"text {i}" for i in range(40)
]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def write_records(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_every_kind(folder: Path) -> None:
    data = lines(TEXTS)
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(data[:100]) + zstandard.compress(data[100:]))
    pq.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), folder / "d.parquet", row_group_size=7)
    write_records(folder / "e.arrayrecord", [text.encode() for text in TEXTS])


def read_all(pieces: list[Piece], c: RawConfig | None = None) -> tuple[list[str], list[Broken]]:
    texts, broken = [], []
    for piece in pieces:
        for found in readers.read(piece, c or RawConfig()):
            if isinstance(found, Document):
                texts.append(found.text)
            else:
                broken.append(found)
    return texts, broken


def pieces_of(path: Path, limit: int = 2**40) -> list[Piece]:
    found, _ = inputs.find((str(path),))
    return [piece for part in inputs.parts(found, limit) for piece in part]


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.arrayrecord"])
@pytest.mark.parametrize("limit", [1, 50, 100, 333, 10**9])
def test_every_kind_gives_its_documents_however_it_is_cut(name: str, limit: int, tmp_path: Path) -> None:
    write_every_kind(tmp_path)
    pieces = pieces_of(tmp_path / name, limit)
    assert read_all(pieces) == (TEXTS, [])
    assert (len(pieces) > 3) == (limit < 400 and name[0] in "ade")
    size = (tmp_path / name).stat().st_size
    assert size - len(pieces) <= sum(piece.size for piece in pieces) <= size


def test_a_text_file_is_a_document_and_a_folder_is_read_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/x.txt", "a/y.html", ".hidden.txt", "c.bin", "z.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found, ignored = inputs.find((str(tmp_path),))
    assert [Path(f.path).name for f in found] == ["x.txt", "y.html", "b.txt"] and ignored == 2
    assert read_all([Piece(f.path, f.kind, f.size) for f in found])[0] == ["a/x.txt", "a/y.html", "b.txt"]
    assert len(inputs.find((str(tmp_path / "z.md"),))[0]) == 1
    assert len(inputs.find((str(tmp_path / "**" / "*.txt"),))[0]) == 2


def test_parts_hold_what_they_may_and_follow_from_the_files_alone() -> None:
    files = [Found(f"f{i}", "text", size) for i, size in enumerate([30, 30, 50, 10, 200, 5, 5])]
    parts = inputs.parts(files, 100)
    assert [[p.path for p in part] for part in parts] == [["f0", "f1"], ["f2", "f3"], ["f4"], ["f5", "f6"]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("no/such",), "does not exist"),
        (("x.exe",), "unknown kind"),
        (("empty",), "no file of a known kind"),
        (("a.txt", "a.txt"), "named twice"),
        (("ftp://x/y",), "no path that can be used"),
        (("hf:wikitext",), "write hf:NAME:CONFIG:SPLIT"),
    ],
)
def test_sources_that_are_none_are_refused(
    names: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("x.exe").touch()
    Path("a.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        inputs.find(names)


def test_an_object_store_is_read_like_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands in for a bucket: the path layer is asked for it, and opens its files."""
    write_every_kind(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "page.html").write_text("x")

    monkeypatch.setattr(
        inputs.paths, "run_path", lambda name: epath.Path(str(name).replace("gs://bucket", str(tmp_path)))
    )
    found, _ = inputs.find(("gs://bucket/a.jsonl",))
    assert found == [Found(str(tmp_path / "a.jsonl"), "jsonl", (tmp_path / "a.jsonl").stat().st_size)]
    everything, _ = inputs.find(("gs://bucket",))
    assert [f.kind for f in everything] == ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrayrecord", "html"]
    with pytest.raises(ConfigError, match="name the folder"):
        inputs.find(("gs://bucket/**/*.jsonl",))
    with pytest.raises(ConfigError, match="does not exist"):
        inputs.find(("gs://bucket/none.jsonl",))


def test_a_data_set_is_read_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[Any]):
        column_names = ("text",)
        dataset_size = 4000

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        if name != "org/set":
            raise FileNotFoundError(f"no data set {name}")
        assert (config, split) == (None, "train")
        return Rows({"text": text} for text in TEXTS)

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    library.__spec__ = types.SimpleNamespace(name="datasets")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", library)
    found, _ = inputs.find(("hf:org/set::train",))
    pieces = [piece for part in inputs.parts(found, 1000) for piece in part]
    assert len(pieces) == 4 and read_all(pieces) == (TEXTS, [])
    with pytest.raises(ConfigError, match="cannot be had: no data set none"):
        inputs.find(("hf:none::train",))
    with pytest.raises(UserError, match="no column 'body'"):
        read_all(pieces, RawConfig(field="body"))


# ---------------------------------------------------------------------------------------------------- 300 broken inputs

Case = tuple[str, bytes, int | None, int | None]  # file name, content, documents and things counted (None: any)


def in_lines() -> list[Case]:
    """A line that is broken among good ones."""
    good = lines(["good"])
    bad: list[bytes] = [
        b'{"text": "\xff"}', b'{"text": "\xc3("}', b'{"text": "\xed\xa0\x80"}', b'{"text": "\\ud800"}',
        b'{"text": "a\\udfffb"}', b'{"text": ""}', b'{"text": null}', b'{"text": 3}', b'{"text": ["a"]}',
        b'{"text": {"a": 1}}', b'{"text": true}', b'{"body": "x"}', b"{}", b"[]", b"null", b'"text"', b"7", b"{",
        b'{"text": "a"', b'{"text": "a}', b"{'text': 'a'}", b"text", b"\x00", b"\x00\x01\x02", b"\xff\xfe{\x00",
        b'{"text": "a"} {"text": "b"}', b'{"text": 1e999}', b'{"Text": "x"}', b'{"text ": "x"}', b"NaN", b"--",
        b"[" * 3000, b'{"a":' * 3000, b'{"text": "' + b"x" * 500_000 + b'"}', b"x" * 3_000_000, b"\xef\xbb\xbf{",
    ]  # fmt: skip
    cases: list[Case] = []
    for ending, pack in (("jsonl", bytes), ("jsonl.gz", gzip.compress), ("jsonl.zst", zstandard.compress)):
        cases += [(f"l{i}.{ending}", pack(good + line + b"\n" + good), 2, 1) for i, line in enumerate(bad)]
        cases += [(f"e{i}.{ending}", pack(good + line), 1, 1) for i, line in enumerate(bad[:24])]
    return cases


def cut_short() -> list[Case]:
    """Files that end too early, or in which a byte is another one."""
    rng = random.Random(0)
    data = lines([prose(seed, 6) for seed in range(30)])
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [prose(seed, 6) for seed in range(30)]}), table, write_page_checksum=True)
    cases: list[Case] = []
    for ending, content in (
        ("jsonl.gz", gzip.compress(data)), ("jsonl.zst", zstandard.compress(data)), ("parquet", table.getvalue())
    ):  # fmt: skip
        for i in range(20):
            at = rng.randrange(1, len(content) - 1)
            cases.append((f"cut{i}.{ending}", content[:at], None, None))
        for i in range(8):
            at = rng.randrange(len(content))
            changed = content[:at] + bytes([content[at] ^ (1 + rng.randrange(255))]) + content[at + 1 :]
            cases.append((f"flip{i}.{ending}", changed, None, None))
        cases.append((f"empty.{ending}", b"", 0 if ending != "parquet" else None, None))
        cases.append((f"zeros.{ending}", bytes(5000), None, None))
        cases.append((f"other.{ending}", data, 0, None))
    return cases


def whole_files() -> list[Case]:
    cases: list[Case] = [
        ("bad.txt", b"caf\xe9", 0, 1), ("utf16.txt", "text".encode("utf-16"), 0, 1), ("empty.txt", b"", 0, 1),
        ("nul.txt", b"\x00" * 10, 1, 0), ("bom.txt", b"\xef\xbb\xbftext", 1, 0), ("huge.txt", b"x" * 400_001, 0, 1),
        ("surrogate.txt", b"a\xed\xb0\x80", 0, 1), ("crlf.txt", b"a\r\nb", 1, 0), ("space.txt", b"  \n", 1, 0),
        ("empty.html", b"", 0, 1), ("latin.html", b"<p>caf\xe9</p>", 1, 0), ("nul.html", b"\x00", 1, 0),
        ("huge.html", b"<p>" * 200_000, 0, 1), ("space.html", b" \n ", 0, 1),
        ("ids.jsonl", lines(["one", "two"]), 2, 0), ("blank.jsonl", b"\n\n  \n", 0, 3), ("empty.jsonl", b"", 0, 0),
        ("mac.jsonl", b'{"text": "a"}\r{"text": "b"}', 0, 1),
        ("long.jsonl", b'{"text": "' + b"y" * 50_000_000 + b'"}\n' + lines(["good"]), 1, 1),
        ("random.arrayrecord", bytes(range(256)) * 40, 0, 1), ("empty.arrayrecord", b"", 0, 1),
        ("text.arrayrecord", b"text", 0, 1),
    ]  # fmt: skip
    for name, column in (("ints", [1, 2]), ("lists", [["a"]]), ("bytes", [b"\xff"]), ("nulls", [None, None])):
        file = io.BytesIO()
        pq.write_table(pa.table({"text": column}), file)
        cases.append((f"{name}.parquet", file.getvalue(), 0, 1))
    for name, table in (("column", pa.table({"body": ["a"]})), ("none", pa.table({"text": pa.array([], pa.string())}))):
        file = io.BytesIO()
        pq.write_table(table, file)
        cases.append((f"{name}.parquet", file.getvalue(), 0, int(name == "column")))
    mixed = io.BytesIO()
    pq.write_table(pa.table({"text": ["good", None, "", "good"]}), mixed)
    cases.append(("mixed.parquet", mixed.getvalue(), 2, 2))
    return cases


CASES = [*in_lines(), *cut_short(), *whole_files()]
C = RawConfig(max_document_bytes=400_000)


def test_there_are_300_broken_inputs() -> None:
    assert len({name for name, *_ in CASES}) == len(CASES) >= 300


@pytest.mark.parametrize("make", [in_lines, cut_short, whole_files])
def test_broken_inputs_are_counted_with_their_place(make: Callable[[], list[Case]], tmp_path: Path) -> None:
    for name, content, documents, counted in make():
        path = tmp_path / name
        path.write_bytes(content)
        texts, broken = read_all(pieces_of(path), C)
        assert documents is None or len(texts) == documents, name
        assert counted is None or len(broken) == counted, (name, broken)
        assert all(b.reason and str(path) in b.origin and len(b.sample) <= 240 for b in broken), name
        for text in texts:
            text.encode("utf-8")
        if name.startswith("cut"):
            assert broken, f"{name} was cut short, and nobody noticed"
        if name.startswith(("l", "e", "whole")) and counted:
            with pytest.raises(UserError, match=r"raw\.bad"):
                read_all(pieces_of(path), RawConfig(max_document_bytes=400_000, bad="refuse"))


def test_what_stands_before_the_damage_is_read(tmp_path: Path) -> None:
    texts = [prose(seed, 30) for seed in range(200)]
    data = lines(texts)
    for name, content in (("a.jsonl.gz", gzip.compress(data)), ("b.jsonl.zst", zstandard.compress(data))):
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        found, broken = read_all(pieces_of(tmp_path / name))
        assert 20 < len(found) < 200 and found == texts[: len(found)]
        assert broken[-1].reason.startswith("damaged")


def test_a_line_of_50_mb_needs_no_memory_of_its_size(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"y" * 50_000_000 + b'"}\n' + lines(["good"]))
    tracemalloc.start()
    try:
        texts, broken = read_all(pieces_of(path), C)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == ["good"] and broken[0].reason == "a line too long" and broken[0].size > 50_000_000
    assert peak < 12_000_000


def test_a_file_that_goes_away_is_told(tmp_path: Path) -> None:
    pieces = pieces_of(write_jsonl(tmp_path / "a.jsonl", ["x"]))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="is gone"):
        read_all(pieces)


def test_blank_lines_are_counted_and_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines(["one"]) + b" \t\n")
    pieces = pieces_of(tmp_path / "a.jsonl")
    for c in (RawConfig(), RawConfig(bad="refuse")):
        texts, broken = read_all(pieces, c)
        assert texts == ["one"] and [(b.reason, b.size) for b in broken] == [("blank line", 1), ("blank line", 3)]
    assert read_all(pieces, RawConfig(field=readers.EVERY, bad="refuse")) == (["one"], [])  # an evaluation set


def test_a_line_may_be_as_long_as_escapes_make_it(tmp_path: Path) -> None:
    text = "é" * 300_000  # six characters of JSON for two bytes
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": text, "other": "x" * 2_000_000}).encode() + b"\n")
    assert read_all(pieces_of(tmp_path / "a.jsonl"), RawConfig(max_document_bytes=600_000)) == ([text], [])


def test_a_name_that_is_not_utf8_is_read_and_can_be_written(tmp_path: Path) -> None:
    write_every_kind(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        odd = path.with_name(os.fsdecode(b"caf\xe9-") + path.name)
        path.rename(odd)
        with odd.open("ab") as file:
            file.write(b"\x00nonsense\n" if path.suffix == ".jsonl" else b"")
        found = [x for piece in pieces_of(odd) for x in readers.read(piece, RawConfig())]
        assert sum(isinstance(x, Document) for x in found) == len(TEXTS), path.name
        assert all("caf\\xe9-" in x.origin and x.origin.encode("utf-8") for x in found)


# ------------------------------------------------------------------------------------------------------ which are found


def test_a_file_by_two_names_is_named_twice(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.jsonl").symlink_to(path)
    with pytest.raises(ConfigError, match="is named twice"):
        inputs.find((str(tmp_path / "*.jsonl"),))


def test_an_output_in_a_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw" / "a.jsonl", ["x"])
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    for name in ("raw", "link"):
        for out in ("raw", "raw/out", "link/deep/out"):
            with pytest.raises(ConfigError, match="holds the output"):
                inputs.check_output(tmp_path / out, (str(tmp_path / name),))
    inputs.check_output(tmp_path / "rawer", (str(tmp_path / "raw"), "python", str(tmp_path / "raw" / "a.jsonl")))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.json", '{"format": 2, "shards": ["shard-00000"]}'),
        ("plan.json", '{"format": 2, "config": {}, "files": [], "parts": []}'),
    ],
)
def test_what_was_prepared_is_not_raw(name: str, text: str, tmp_path: Path) -> None:
    for folder in ("old/work", "ours"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
    write_jsonl(tmp_path / "raw" / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "raw" / "old" / "work" / "b.jsonl", ["x"])
    write_jsonl(tmp_path / "raw" / "ours" / "c.jsonl", ["x"])
    (tmp_path / "raw" / "ours" / "plan.json").write_text('{"who": "somebody else"}')
    (tmp_path / "raw" / "old" / name).write_text(text)
    for source, others in (("raw", 3), ("raw/**/*.jsonl", 1)):
        found, ignored = inputs.find((str(tmp_path / source),))
        assert [Path(f.path).name for f in found] == ["a.jsonl", "c.jsonl"] and ignored == others
