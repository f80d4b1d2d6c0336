"""Every kind of source gives its documents, and everything wrong with one is said with its name."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from kdqat.data import TextSource, iter_documents, read_documents

ROWS: list[dict[str, Any]] = [
    {"text": "first", "title": "A"},
    {"text": "second", "title": ""},
    {"text": "", "title": None},
    {"text": "third", "title": "C"},
]


def write_rows(path: Path) -> str:
    text = "\n".join(map(json.dumps, ROWS)) + "\n\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_columns_are_joined_and_empty_values_dropped(name: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / name)
    assert read_documents(path) == ["first", "second", "third"]
    assert read_documents(TextSource(path=path, keys=("title", "text"))) == ["A\nfirst", "second", "C\nthird"]


def test_a_slice_counts_the_rows_of_the_file_and_not_only_the_filled_ones(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl")
    assert read_documents(TextSource(path=path, rows="1:4")) == ["second", "third"]
    assert read_documents(TextSource(path=path, rows="3:")) == ["third"]
    assert read_documents(TextSource(path=path, rows=":1")) == ["first"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_document_or_one_per_line(name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, "one\n\ntwo\r\nthree"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read_documents(str(path)) == [text]
    assert read_documents(TextSource(path=str(path), split_lines=True)) == ["one", "two", "three"]


def test_sources_follow_one_another_and_the_limit_counts_over_all(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("last")
    sources: list[str | TextSource] = [write_rows(tmp_path / "a.jsonl"), TextSource(path=str(tmp_path / "b.txt"))]
    assert read_documents(sources) == ["first", "second", "third", "last"]
    assert read_documents(sources, limit=2) == ["first", "second"]


def test_the_python_documentation_is_split_without_overlap_topics_first() -> None:
    heldout = read_documents("python_docs:heldout")
    train = list(iter_documents("python_docs:train"))
    assert not set(heldout) & set(train)
    assert 3 < len(train) / len(heldout) < 5
    assert sum(map(len, train)) > 1_000_000
    assert heldout == read_documents("python_docs:heldout")
    import pydoc_data.topics

    topics = set(pydoc_data.topics.topics.values())
    assert set(train[:50]) <= topics and not set(train[100:]) & topics


def test_the_prose_is_shipped_and_is_not_about_python() -> None:
    (prose,) = read_documents("kdqat:prose")
    assert 1500 < len(prose.split()) < 2500
    assert "python" not in prose.lower()


def test_any_other_name_is_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(path: str, name: str | None, **kwargs: Any) -> Any:
        calls.append((path, name, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_documents("org/name:config") == ["first", "second", "third"]
    assert list(itertools.islice(iter_documents(TextSource(path="org/name", split="test"), stream=True), 1)) == [
        "first"
    ]
    assert calls == [
        ("org/name", "config", {"split": "train", "streaming": False}),
        ("org/name", None, {"split": "test", "streaming": True}),
    ]


def test_a_data_set_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route to hub\nlong traceback")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"^org/name: no file .*no route to hub\).*check NAME or NAME:CONFIG"):
        read_documents("org/name")


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        ('{"text": "a"}\n{"text": ', {"path": "a.jsonl"}, r"a\.jsonl, line 2: is no JSON"),
        ('{"text": "a"}\n[1]', {"path": "a.jsonl"}, r"a\.jsonl, line 2: is a list"),
        ('{"body": "a", "id": 1}', {"path": "a.jsonl"}, r"row 0: has no column 'text'; it has body, id"),
        ('{"text": ["a"]}', {"path": "a.jsonl"}, r"column 'text' is a list"),
        ("", {"path": "a.jsonl"}, r"a\.jsonl: holds no text"),
        (" \n ", {"path": "a.txt"}, r"a\.txt: holds no text"),
        ('{"text": "a"}', {"path": "a.jsonl", "rows": "5:"}, r"a\.jsonl: rows='5:' selects nothing"),
        ("no parquet", {"path": "a.parquet"}, r"a\.parquet: cannot be read as parquet"),
        ("no gzip", {"path": "a.txt.gz"}, r"a\.txt\.gz: cannot be read"),
        ("x", {"path": "a.csv"}, r"a\.csv: cannot tell what it holds; known are \.txt"),
    ],
)
def test_a_bad_file_is_named(content: str, source: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / source["path"]).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(TextSource(**{**source, "path": str(tmp_path / source["path"])}))


def test_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt: cannot be read .*UTF-8"):
        read_documents(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("path", ["missing.txt", "./missing", "/nowhere/a.parquet"])
def test_a_missing_file_is_not_taken_for_a_data_set(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path}: no such file"):
        read_documents(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "a.jsonl", "rows": "240"}, "is no slice"),
        ({"path": "a.jsonl", "rows": "5:5"}, "is no slice"),
        ({"path": "a.jsonl", "split_lines": True}, "split_lines goes with"),
        ({"path": "a.txt", "keys": ("body",)}, "has no columns"),
        ({"path": "a.jsonl", "keys": "body"}, "keys is a list"),
        ({"path": "a.jsonl", "split": "test"}, "split goes with data sets"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused_before_anything_is_read(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TextSource(**arguments)


def test_unknown_corpora_and_empty_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no such corpus; there are python_docs:train"):
        read_documents("python_docs:test")
    with pytest.raises(ValueError, match="no text is named"):
        read_documents([])
