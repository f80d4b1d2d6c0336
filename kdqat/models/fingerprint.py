"""What a model is, told from its files: a fingerprint that costs milliseconds and loads nothing.

Weight files of hundreds of gigabytes are not read whole. Of each large file the size, the head (tensor names, shapes,
GGUF's metadata) and 64 blocks evenly spread over it are hashed: training moves every tensor, and a block lies in every
sixty-fourth of the file. Small files are hashed whole.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path

_WHOLE = 1 << 24  # files up to this size are hashed whole
_NUM_BLOCKS, _BLOCK = 64, 1 << 16
_GGUF_HEAD = 1 << 22
_LARGEST_HEAD = 1 << 27  # of safetensors; what its own reader accepts is less


def files_fingerprint(files: Iterable[Path]) -> str:
    """sha256 over `files`, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(_file_digest(path))
    return digest.hexdigest()


def folder_fingerprint(folder: Path, *, code: bool = False) -> str:
    """sha256 over config and weights of a Hugging Face folder; with `code` over its Python files as well."""
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json", *(("*.py",) if code else ()))
    return files_fingerprint(path for pattern in patterns for path in sorted(folder.glob(pattern)))


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size};".encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
            return digest.digest()
        digest.update(file.read(_head_bytes(path)))
        for number in range(_NUM_BLOCKS):
            file.seek((size - _BLOCK) * number // (_NUM_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.digest()


def _head_bytes(path: Path) -> int:
    if path.suffix != ".safetensors":
        return _GGUF_HEAD
    with path.open("rb") as file:
        return min(8 + struct.unpack("<Q", file.read(8))[0], _LARGEST_HEAD)
