"""The token cache: what was tokenized once is read back, under a key of everything that decided it.

The key holds the bytes of the files, the tokenizer's own JSON and every argument, so nothing stale can come back:
a changed input is another file. Files are safetensors with a checksum, written aside and renamed. The cache is a
convenience: one that is damaged or cannot be written is said aloud, and the work is done without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdqat.data.blocks import Rows
from kdqat.data.corpora import CORPORA, corpus_fingerprint
from kdqat.data.records import looks_like_file
from kdqat.data.texts import Texts, as_sources, iter_raw
from kdqat.files import cache_root

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when packing or labelling changes what is stored
Packed = tuple[Rows, dict[str, int]]  # rows and the counts that describe them


def cache_dir() -> Path:
    """The folder `tokens` of the cache root."""
    return cache_root() / "tokens"


def cached(key: Mapping[str, Any] | None, build: Callable[[], Packed]) -> Packed:
    """What `build` makes, or what it made before under the same `key`; key None: not cached."""
    if key is None:
        return build()
    text = json.dumps({"version": FORMAT_VERSION, **key}, sort_keys=True)
    path = cache_dir() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            return _read(path, text)
        except Exception as error:  # whatever is wrong with the file, it can be made again
            log.warning("token cache %s is damaged (%s): tokenizing again", path, error)
    rows, facts = build()
    try:
        _write(path, text, rows, facts)
    except OSError as error:
        log.warning("token cache %s cannot be written (%s): going on without; set KDQAT_CACHE", path, error)
    return rows, facts


def texts_fingerprint(texts: Texts) -> list[Any]:
    """What decides the documents of `texts`: arguments, and file contents by sha256 of their bytes."""
    return [[asdict(source), source_fingerprint(source.path, texts=source)] for source in as_sources(texts)]


def source_fingerprint(path: str, *, texts: Any = None) -> str:
    """sha256 of a file's bytes, of an embedded corpus, or (a data set) of the documents `texts` reads.

    Raises:
        ValueError: for a file that cannot be read.
    """
    if path in CORPORA:
        return _sha256(corpus_fingerprint(path).encode())
    if looks_like_file(path):
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    digest = hashlib.sha256()
    for document in iter_raw(texts):
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(rows: Rows) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(rows.tensors().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, key: str, rows: Rows, facts: Mapping[str, int]) -> None:
    from safetensors.torch import save

    metadata = {"key": key, "facts": json.dumps(facts), "sha256": _checksum(rows)}
    data = save({name: tensor.contiguous() for name, tensor in rows.tensors().items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")  # a name of its own: ranks write at once
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _read(path: Path, key: str) -> Packed:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        rows = Rows(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
    if metadata.get("key") != key or metadata.get("sha256") != _checksum(rows):
        raise ValueError("checksum")
    return rows, json.loads(metadata["facts"])
