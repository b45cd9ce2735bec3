"""Documents of files: exact where they are good, refused or counted where they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_jax.data.sources import EMBEDDED, Files, Policy, Reader, find_files
from lm_jax.errors import ConfigError, UserError


def texts(source: str | tuple[str, ...] | Path, **policy: object) -> list[str]:
    return [d.text for d in Reader(find_files(str(source) if isinstance(source, Path) else source), Policy(**policy))]  # type: ignore[arg-type]


def dropped(path: Path, **policy: object) -> tuple[list[str], dict[str, int]]:
    reader = Reader(find_files(str(path)), Policy(bad="drop", **policy))  # type: ignore[arg-type]
    return [d.text for d in reader], dict(reader.dropped)


def parquet(path: Path, values: pa.Array, name: str = "text") -> Path:
    pq.write_table(pa.table({"other": list(range(len(values))), name: values}), path, row_group_size=2)
    return path


def test_nothing_about_a_text_changes(tmp_path: Path) -> None:
    text = "\ufeff a\r\nb\rc\n\n\t \x0b\x0c\x85\u2028 \0 \U0001f600 e\u0301 "
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(  # a mark at the start of such a file is no part of a text
        "\ufeff" + json.dumps({"text": text}) + "\r\n" + json.dumps({"text": text}, ensure_ascii=False)
    )
    parquet(tmp_path / "c.parquet", pa.array([text]))
    assert texts(tmp_path) == [text] * 4


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=8))
def test_any_text_survives_every_kind_of_file(tmp_path: Path, many: list[str]) -> None:
    for n, text in enumerate(many):
        (tmp_path / f"{n}.txt").write_bytes(text.encode())
    (tmp_path / "all.jsonl").write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in many), newline=""
    )
    parquet(tmp_path / "all.parquet", pa.array(many))
    assert texts(tuple(str(tmp_path / f"{n}.txt") for n in range(len(many)))) == many
    assert texts(tmp_path / "all.jsonl") == many
    assert texts(tmp_path / "all.parquet") == many


def test_directories_and_globs_are_in_order_and_count_what_they_pass_over(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.TXT", "README.md", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = find_files(str(tmp_path))
    assert [str(p.relative_to(tmp_path)) for p in files.paths] == ["a.txt", "b/1.TXT", "b/2.txt"]
    assert files.ignored == 1
    assert texts(str(tmp_path / "**" / "*.txt")) == ["a.txt", "b/2.txt"]
    assert texts((str(tmp_path / "b"), str(tmp_path / "a.txt"))) == ["b/1.TXT", "b/2.txt", "a.txt"]
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert len(find_files(str(tmp_path)).paths) == 3
    (tmp_path / "[odd].txt").write_text("odd")
    assert texts(str(tmp_path / "[odd].txt")) == ["odd"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.txt", "does not exist"),
        ("gooo.txt", "did you mean .*good.txt"),
        ("*.xyz", "no file of a known kind"),
        ("empty", "no file of a known kind"),
        ("notes.md", "unknown kind"),
        (("good.txt", "./good.txt"), "named twice"),
        ((), "names nothing"),
        ("gs://bucket/x.txt", "not on this machine"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=says) as error:
        find_files(source)
    assert error.value.key == "data.source"
    assert len(str(error.value).splitlines()) <= 3


def test_the_embedded_default_is_python_and_no_tests() -> None:
    files = find_files(EMBEDDED)
    names = {p.name for p in files.paths}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any({"site-packages", "test", "tests", "encodings"} & set(p.parts[-3:-1]) for p in files.paths)
    documents = texts(EMBEDDED)
    assert sum(map(len, documents)) > 4_000_000 and len(documents) > 300


BAD_LINES = {
    b'{"text": "cut off': "not JSON",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"other": "x"}': "no such field",
    b'{"text": 3}': "not text",
    b'{"text": null}': "not text",
    b'["text"]': "not an object",
    b"[" * 100_000: "not JSON",
    b'{"text": "' + b"x" * 200 + b'"}': "too large",
    b'{"text": "' + b"x" * (2**20 + 5000) + b'"}': "too large",
}


@pytest.mark.parametrize(
    ("line", "reason"), BAD_LINES.items(), ids=[f"{r}-{n}" for n, r in enumerate(BAD_LINES.values())]
)
def test_bad_lines_are_refused_with_their_number_or_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n\n{"text": ""}')
    with pytest.raises(UserError, match=r"x\.jsonl line 2: .") as error:
        texts(path, max_bytes=100)
    assert len(str(error.value)) < 600 and len(str(error.value).splitlines()) <= 3
    assert dropped(path, max_bytes=100) == (["one", "two"], {reason: 1, "blank line": 1, "empty": 1})


def test_bad_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"x" * 101)
    (tmp_path / "d.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.txt: is not UTF-8: byte 3 is 0xe9"):
        texts(tmp_path)
    with pytest.raises(UserError, match=r"c\.txt: has 101 bytes"):
        texts(tmp_path / "c.txt", max_bytes=100)
    assert dropped(tmp_path, max_bytes=100) == (["ok"], {"not UTF-8": 1, "too large": 1, "empty": 1})


def test_the_field_is_named_and_found(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "why", "answer": "so"}\n')
    with pytest.raises(UserError, match=r"no field 'text' \(data\.field\); it has question, answer"):
        texts(tmp_path)
    assert texts(tmp_path, field="answer") == ["so"]
    parquet(tmp_path / "y.parquet", pa.array(["p"]), "body")
    with pytest.raises(UserError, match=r"no column 'answer'\n.*other, body"):
        texts(tmp_path, field="answer")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_columns_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    path = parquet(tmp_path / "x.parquet", pa.array(["one", "", "two", None, "thrée"], pa.string()).cast(kind))
    with pytest.raises(UserError, match=r"x\.parquet row 4: holds NoneType"):
        texts(path)
    assert dropped(path) == (["one", "two", "thrée"], {"empty": 1, "not text": 1})


def test_columns_of_anything_else(tmp_path: Path) -> None:
    for n, values in enumerate([pa.array([1, 2]), pa.array([b"x"]), pa.array([["x"]])]):
        with pytest.raises(UserError, match="not text"):
            texts(parquet(tmp_path / f"{n}.parquet", values), bad="drop")


def test_bad_utf8_in_a_column(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"\xff\xfe", b"two"])
    bad = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = parquet(tmp_path / "x.parquet", bad)
    with pytest.raises(UserError, match="row 2: is not UTF-8"):
        texts(path)
    assert dropped(path) == (["one", "two"], {"not UTF-8": 1})


@pytest.mark.parametrize("keep", [0, 3, 40, -9, -1])
def test_truncated_parquet_is_refused_by_either_policy(tmp_path: Path, keep: int) -> None:
    path = parquet(tmp_path / "x.parquet", pa.array(["text " * 50] * 9))
    path.write_bytes(path.read_bytes()[:keep])
    for bad in ("refuse", "drop"):
        with pytest.raises(UserError, match=r"x\.parquet: is no parquet file, or is damaged"):
            texts(path, bad=bad)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    files = Files((tmp_path / "gone.txt",), "x")
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read: No such file"):
        list(Reader(files, Policy()))
