"""Files and folders that appear whole or not at all: written under a temporary name, synced, renamed.

A reader, and a run that starts again after a crash, never meets a half-written file under a real name.

Also where things lie that can be made again (`cache_root`), and fingerprints that say what they were made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, replacing what was there in one step."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json_as(path: Path, name: str, content: Any) -> None:
    """Write plain data to `path` (a file, or a folder that gets `name`), whole or not at all."""
    write_text(path / name if path.is_dir() else path, json.dumps(content, indent=1))


def read_json_as(path: Path, name: str, parse: Callable[[Any], T], maker: str) -> T:
    """What `parse` makes of the JSON in `path`, a file or the folder that holds `name`.

    Raises:
        ValueError: naming the file, if it is not there (`maker` says what writes it) or not valid.
    """
    path = path / name if path.is_dir() else path
    try:
        return parse(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {maker}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is synced and renamed, on an error removed.

    Raises:
        OSError: of the writing itself, with what was at `path` untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        _sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`; on success it takes the name, on an error it is removed.

    Args:
        path: the folder to make.
        overwrite: an existing `path` is replaced, at the very end.

    Raises:
        FileExistsError: if `path` exists and overwrite is off.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already")
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        mode = part.stat().st_mode & 0o666  # as the umask has it: safetensors leaves files to their owner alone
        for file in sorted(part.rglob("*")):
            if file.is_file():
                file.chmod(mode)
            _sync(file)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def cache_root() -> Path:
    """$KDQAT_CACHE, or ~/.cache/kdqat: tokens lie in its folder `tokens`, teachers' answers in `teachers`."""
    return Path(os.environ.get("KDQAT_CACHE") or Path.home() / ".cache" / "kdqat")


def sha256_of(value: Any) -> str:
    """sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """sha256 of the tokenizer's JSON and special tokens; None for one without JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    # any earlier call may have changed these two, and they are not used here
    state.pop("truncation", None)
    state.pop("padding", None)
    return sha256_of([state, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}])


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename never overtakes its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
