"""Where text comes from: files, embedded corpora, data sets; always as a sequence of documents.

    "notes.txt"                                a file is one document (split_lines: each line is)
    "c4.jsonl"  "c4.jsonl.gz"  "c4.parquet"    each row is a document: its columns `keys` joined by a newline
    "python_docs:train"  "python_docs:heldout" the documentation inside every Python, split by topic and module
    "kdqat:prose"                              a few pages of prose, as text from another domain
    "NAME" or "NAME:CONFIG"                    a data set of the `datasets` library

The order is the order of the sources, so that a slice or a limit always means the same documents.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kdqat.data.corpora import CORPORA, iter_corpus
from kdqat.data.records import (
    TEXT_SUFFIXES,
    has_file_form,
    iter_records,
    looks_like_file,
    open_text,
    parse_slice,
    require_file,
    take_rows,
)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """One source of text, where its name alone does not say enough.

    Args:
        path: a file, an embedded corpus, or a data set; see the head of this file.
        rows: slice of the documents as the source counts them, e.g. "0:240"; None: all.
        keys: columns that make up a document, for sources with columns; empty values are left out.
        split_lines: each line of a text file is a document.
        split: split of a data set; None: "train".

    Raises:
        ValueError: for a malformed slice, or an argument that the kind of source has no use for.
    """

    path: str
    rows: str | None = None
    keys: tuple[str, ...] = ("text",)
    split_lines: bool = False
    split: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keys, str) or not self.keys:
            raise ValueError(f"{self.path}: keys is a list of column names, e.g. [text], not {self.keys!r}")
        object.__setattr__(self, "keys", tuple(self.keys))  # a recipe gives a list; a frozen value must hash
        object.__setattr__(self, "path", os.path.expanduser(self.path))
        if self.rows is not None:
            parse_slice(self.rows, self.path)
        is_text = self.path.endswith(TEXT_SUFFIXES)
        if self.split_lines and not is_text:
            raise ValueError(f"{self.path}: split_lines goes with {' and '.join(TEXT_SUFFIXES)} files only")
        if self.keys != ("text",) and (is_text or self.path in CORPORA):
            raise ValueError(f"{self.path}: has no columns, so keys={list(self.keys)} means nothing; leave it out")
        if self.split is not None and (self.path in CORPORA or has_file_form(self.path)):
            raise ValueError(f"{self.path}: split goes with data sets only; leave it out")


Texts: TypeAlias = str | TextSource | list[str | TextSource]


def as_sources(texts: Texts) -> list[TextSource]:
    """The sources that `texts` names, in order.

    Raises:
        ValueError: if it names none.
    """
    items: Sequence[str | TextSource] = [texts] if isinstance(texts, str | TextSource) else texts
    if not items:
        raise ValueError("no text is named: give a file, a data set, or 'python_docs:train'")
    return [TextSource(path=item) if isinstance(item, str) else item for item in items]


def iter_documents(texts: Texts, *, stream: bool = False, limit: int | None = None) -> Iterator[str]:
    """The documents of `texts`, one after the other; blank ones are left out.

    Args:
        texts: what to read.
        stream: do not download data sets first.
        limit: at most this many documents; None: all.

    Raises:
        ValueError: for what cannot be read, a missing column, or no document at all; the message names the source.
    """
    sources = as_sources(texts)
    documents = (doc for source in sources for doc in iter_raw(source, stream=stream) if doc.strip())
    first = next(documents, None)
    if first is None:
        raise ValueError(f"{', '.join(source.path for source in sources)}: holds no text")
    yield from itertools.islice(itertools.chain([first], documents), limit)


def read_documents(texts: Texts, *, limit: int | None = None) -> list[str]:
    """`iter_documents` as a list."""
    return list(iter_documents(texts, limit=limit))


def iter_raw(source: TextSource, *, stream: bool = False) -> Iterator[str]:
    """The documents of one source as they are, blank ones included: `rows` counts these."""
    return take_rows(_iter_all(source, stream), source.rows, source.path)


def _iter_all(source: TextSource, stream: bool) -> Iterator[str]:
    path = source.path
    if path in CORPORA:
        yield from iter_corpus(path)
    elif path.startswith(("python_docs:", "kdqat:")):
        raise ValueError(f"{path}: there is no such corpus; there are {', '.join(CORPORA)}")
    elif looks_like_file(path) and require_file(path) in TEXT_SUFFIXES:
        yield from _iter_text_file(path, source.split_lines)
    else:
        rows = iter_records(path, split=source.split, stream=stream)
        yield from _join_columns(rows, source.keys, path)


def _iter_text_file(path: str, split_lines: bool) -> Iterator[str]:
    try:
        with open_text(path) as file:
            if split_lines:
                yield from (line.rstrip("\r\n") for line in file)
            else:
                yield file.read()
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); it must be UTF-8 and whole") from error


def _join_columns(rows: Iterable[dict[str, Any]], keys: Sequence[str], path: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        parts = []
        for key in keys:
            if key not in row:
                raise ValueError(
                    f"{path}, row {number}: has no column {key!r}; it has {', '.join(row) or 'none'}. "
                    "Name yours with keys"
                )
            if isinstance(row[key], list | dict):
                kind = type(row[key]).__name__
                raise ValueError(f"{path}, row {number}: column {key!r} is a {kind}, not text; name another with keys")
            parts.append("" if row[key] is None else str(row[key]))
        yield "\n".join(part for part in parts if part)
