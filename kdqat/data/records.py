"""Rows of data files as plain dicts: jsonl, parquet and Hugging Face data sets, read one after the other.

Whatever is wrong with a file is said with its name, the place and the remedy, because these files are the user's.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")
TEXT_SUFFIXES = (".txt", ".txt.gz")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_FILE_ENDINGS = (".txt", ".jsonl", ".json", ".gz", ".parquet", ".csv", ".arrow")  # no data set is called so


def file_suffix(path: str) -> str | None:
    """The suffix that decides how a file is read (".txt" ... ".parquet"), or None for one that we do not read."""
    return next((s for s in TEXT_SUFFIXES + RECORD_SUFFIXES if path.endswith(s)), None)


def has_file_form(path: str) -> bool:
    """Whether `path` is written as a file, be it there or not."""
    return path.startswith(("/", ".")) or Path(path).suffix in _FILE_ENDINGS


def looks_like_file(path: str) -> bool:
    """Whether `path` means something on this machine and not the name of a data set."""
    return has_file_form(path) or Path(path).exists()


def open_text(path: str) -> IO[str]:
    """Open a UTF-8 file, gzip or plain, with its newlines untouched."""
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return open(path, encoding="utf-8", newline="\n")


def require_file(path: str) -> str:
    """The suffix of an existing file that we can read.

    Raises:
        ValueError: if there is no such file, or it is a folder, or of an unknown kind.
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    suffix = file_suffix(path)
    if suffix is None:
        raise ValueError(f"{path}: cannot tell what it holds; known are {', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}")
    return suffix


def iter_records(path: str, *, split: str | None = None, stream: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl, .jsonl.gz or .parquet file, or of a data set "NAME" or "NAME:CONFIG".

    Args:
        path: file or data set.
        split: split of a data set; None: "train". Files have none.
        stream: read a data set over the network row by row and not download it first.

    Raises:
        ValueError: for a file or data set that cannot be read; the message names it and, in jsonl, the line.
    """
    if not looks_like_file(path):
        yield from _iter_hf(path, split or "train", stream)
        return
    if split is not None:
        raise ValueError(f"{path}: split={split!r} goes with data sets only, a file has no splits; leave it out")
    suffix = require_file(path)
    try:
        if suffix == ".parquet":
            yield from _iter_parquet(path)
        elif suffix in RECORD_SUFFIXES:
            yield from _iter_jsonl(path)
        else:
            raise ValueError(f"{path}: holds plain text, here rows are needed ({', '.join(RECORD_SUFFIXES)})")
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); it must be UTF-8 and whole") from error


def take_rows(rows: Iterator[T], selection: str | None, where: str) -> Iterator[T]:
    """The rows of the slice "START:STOP" (either may be missing), counted from 0.

    Raises:
        ValueError: if `selection` is no such slice, or selects nothing; `where` names the source.
    """
    if selection is None:
        yield from rows
        return
    start, stop = parse_slice(selection, where)
    found = False
    for row in itertools.islice(rows, start, stop):
        found = True
        yield row
    if not found:
        raise ValueError(f"{where}: rows={selection!r} selects nothing, there are fewer rows than {start + 1}")


def parse_slice(selection: str, where: str) -> tuple[int, int | None]:
    """ "0:240" -> (0, 240), "240:" -> (240, None).

    Raises:
        ValueError: if it is no slice of non-negative numbers, or an empty one.
    """
    match = re.fullmatch(r"(\d*):(\d*)", selection)
    start, stop = (int(match[1] or 0), int(match[2]) if match[2] else None) if match else (0, 0)
    if stop is not None and stop <= start:
        raise ValueError(f"{where}: rows={selection!r} is no slice; write START:STOP, e.g. '0:240' or '240:'")
    return start, stop


def _iter_jsonl(path: str) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: is no JSON ({error.msg}); one object a line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: is a {type(row).__name__}, not an object with keys")
            yield row


def _iter_parquet(path: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error}); write the file again") from error


def _iter_hf(name: str, split: str, stream: bool) -> Iterator[dict[str, Any]]:
    import datasets  # seconds to import: only who names a data set pays for it

    path, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(path, config or None, split=split, streaming=stream)
    except Exception as error:  # the hub raises a dozen classes for "not there" and "no network"
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{name}: no file of that name here, and the data set's split {split!r} could not be loaded "
            f"({type(error).__name__}: {reason}). A file: check the path. A data set: check NAME or NAME:CONFIG "
            "and the network, or download it on a machine that has one and name the .jsonl or .parquet file"
        ) from error
    yield from dataset
