"""A folder of a teacher's answers, found by row keys. Nothing in it is pickled, and nothing half-written.

    identity.json             who answered, and what was kept of the answers
    head.safetensors          of hidden states: the head that goes with them
    rows-*.safetensors        shards: `keys`, a checksum of each row, and the rows of every stored tensor

A shard appears whole or not at all, so filling can stop at any moment and go on later; several may fill one folder. The
index is built from the shards' keys when the folder is opened. A shard that cannot be read, or belongs to another
teacher, is said aloud and its rows are missing. Rows are read through memory maps into one buffer a batch, pinned where
they go to a GPU; each is checked against its checksum when it is first read.
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdqat.files import sha256_of, whole_file, write_text

log = logging.getLogger(__name__)

IDENTITY_FILE, HEAD_FILE = "identity.json", "head.safetensors"
_DTYPES = {"U16": torch.uint16, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_OURS = ("keys", "crc")  # what a shard holds beside the answers
_ABANDONED = 3600  # seconds after which a temporary file belongs to nobody


class Shard:
    """One file of rows, mapped into memory.

    Raises:
        ValueError, SafetensorError, OSError: if it is no whole shard of `identity`.
    """

    def __init__(self, path: Path, identity: str, names: Sequence[str]) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:  # also compares the file's size with its header
            if (file.metadata() or {}).get("identity") != identity:
                raise ValueError("it belongs to another teacher")
            if sorted(file.keys()) != sorted((*names, *_OURS)):
                raise ValueError("it lacks tensors")
            self.keys = [row.tobytes() for row in file.get_tensor("keys").numpy()]
            self.crc: list[int] = file.get_tensor("crc").tolist()
        self.checked = [False] * len(self.keys)
        with path.open("rb") as raw:
            start = 8 + int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(start - 8))
        self.rows: dict[str, np.ndarray] = {}  # bytes [N, bytes of a row]
        self.kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in sorted(names):
            first, end = header[name]["data_offsets"]
            num_rows, *shape = header[name]["shape"]
            if num_rows != len(self.keys) or len(self.crc) != num_rows:
                raise ValueError("its tensors have different numbers of rows")
            where = (num_rows, (end - first) // num_rows)
            self.rows[name] = np.memmap(path, np.uint8, "r", start + first, where)
            self.kinds[name] = _DTYPES[header[name]["dtype"]], tuple(shape)

    def check(self, row: int) -> None:
        """
        Raises:
            ValueError: if the row is not what was written.
        """
        if self.checked[row]:
            return
        crc = 0
        for rows in self.rows.values():
            crc = zlib.crc32(rows[row], crc)
        if crc != self.crc[row]:
            raise ValueError(f"teacher cache: {self.path} is damaged; delete it and run `kdqat cache RECIPE`")
        self.checked[row] = True


class TeacherCache:
    """The answers in `folder`, which need not exist yet.

    Args:
        folder: where they lie.
        identity: who answers and what is kept, as plain data.
        names: of the tensors kept for a row.

    Raises:
        ValueError: if the folder holds answers of another identity; the message names what differs.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], names: Sequence[str]) -> None:
        self.folder, self.identity, self.names = folder, dict(identity), tuple(names)
        self._mark = sha256_of(self.identity)
        self._index: dict[bytes, tuple[Shard, int]] = {}
        self.damaged: list[Path] = []
        _require_identity(folder, self.identity)
        for path in sorted(folder.glob("rows-*.safetensors")):
            self._open(path)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def read(self, keys: Sequence[bytes], device: torch.device) -> dict[str, Tensor]:
        """The rows `keys` of every tensor, [B, ...] on `device`.

        Raises:
            ValueError: if a row is missing or damaged.
        """
        if missing := [key for key in keys if key not in self._index]:
            raise ValueError(missing_rows(self.folder, len(keys) - len(missing), len(keys)))
        places = [self._index[key] for key in keys]
        for shard, row in places:
            shard.check(row)
        answers = {}
        for name, (dtype, shape) in places[0][0].kinds.items():
            buffer = torch.empty((len(keys), *shape), dtype=dtype, pin_memory=device.type == "cuda")
            target = _as_bytes(buffer)
            for number, (shard, row) in enumerate(places):
                target[number] = shard.rows[name][row]
            answers[name] = buffer.to(device, non_blocking=True)
        return answers

    def begin(self, about: str) -> None:
        """Make the folder ready for writing: its identity (and `about`, for who looks), without what was abandoned."""
        content = {"about": about, "identity": self.identity}
        write_text(self.folder / IDENTITY_FILE, json.dumps(content, indent=1))
        for path in self.folder.glob(".rows-*.part"):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
        for path in self.damaged:
            path.unlink(missing_ok=True)
        self.damaged = []

    def write(self, keys: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        """Add a shard: for each of `keys` one row of every tensor [N, ...], on the CPU."""
        rows = {name: tensors[name].contiguous() for name in sorted(self.names)}
        crc = [0] * len(keys)
        for tensor in rows.values():
            crc = [zlib.crc32(row, before) for row, before in zip(_as_bytes(tensor), crc, strict=True)]
        own = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)}
        path = self.folder / f"rows-{uuid.uuid4().hex}.safetensors"
        with whole_file(path) as part:
            save_file({**rows, **own, "crc": torch.tensor(crc)}, part, {"identity": self._mark})
        self._open(path)

    def write_head(self, state: Mapping[str, Tensor]) -> None:
        """Store the head's tensors by name."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        with whole_file(self.folder / HEAD_FILE) as part:
            save_file(tensors, part, {"identity": self._mark, "crc": str(_crc(tensors))})

    def read_head(self) -> dict[str, Tensor] | None:
        """The head's tensors, or None if there are none.

        Raises:
            ValueError: if the file is damaged, or another teacher's.
        """
        path = self.folder / HEAD_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"teacher cache: {path} is damaged ({error}); delete it and run `kdqat cache`") from error
        if about.get("identity") != self._mark or about.get("crc") != str(_crc(state)):
            raise ValueError(f"teacher cache: {path} is damaged or another teacher's; delete it and run `kdqat cache`")
        return state

    def _open(self, path: Path) -> None:
        try:
            shard = Shard(path, self._mark, self.names)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            log.warning("teacher cache: %s is left out (%s); its rows are missing", path, error)
            if isinstance(error, SafetensorError):
                self.damaged.append(path)
            return
        self._index.update((key, (shard, row)) for row, key in enumerate(shard.keys))


def missing_rows(folder: Path, found: int, total: int) -> str:
    """The message for rows that are not cached."""
    return (
        f"teacher cache {folder}: {found} of {total} rows are cached; run `kdqat cache RECIPE` "
        "(another seq_len, packing, text or tokenizer makes other rows)"
    )


def row_bytes(kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes on disk for a row of these tensors, with its key and checksum."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds.values()) + 16 + 8


def _require_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    path = folder / IDENTITY_FILE
    if not path.is_file():
        return
    try:
        stored = dict(json.loads(path.read_text())["identity"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"teacher cache: {path} is damaged ({error}); delete {folder}, run `kdqat cache`") from error
    keys = dict.fromkeys([*stored, *identity])
    other = [f"{k} ({_short(stored.get(k))}, here {_short(identity.get(k))})" for k in keys
             if stored.get(k) != identity.get(k)]  # fmt: skip
    if other:
        raise ValueError(
            f"teacher cache {folder} was made with another {', another '.join(other)}: name another `folder` (or none) "
            "and run `kdqat cache RECIPE`"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text[:8] if len(text) == 64 else text  # a fingerprint


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor [N, ...] as bytes [N, bytes of a row], sharing memory."""
    return tensor.view(len(tensor), -1).view(torch.uint8).numpy()


def _crc(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(_as_bytes(tensors[name].reshape(1, -1)).data, crc)
    return crc
