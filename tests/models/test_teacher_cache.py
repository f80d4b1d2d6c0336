"""The folder of answers: what is written is read, and what is damaged or foreign is said and counts as missing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from kdqat.models.teacher_cache import IDENTITY_FILE, TeacherCache, row_bytes

CPU = torch.device("cpu")
IDENTITY = {"model": "a" * 64, "k": 4}
KEYS = [bytes([i]) * 16 for i in range(5)]
TENSORS = {
    "ids": torch.arange(60000, 60060).reshape(5, 3, 4).to(torch.uint16),
    "tail": torch.randn(5, 3),
    "hidden": torch.randn(5, 3, 2).bfloat16(),
}


def opened(folder: Path, **changes: object) -> TeacherCache:
    return TeacherCache(folder, {**IDENTITY, **changes}, tuple(TENSORS))


def written(folder: Path) -> TeacherCache:
    cache = opened(folder)
    cache.begin("a toy")
    cache.write(KEYS[:3], {name: tensor[:3] for name, tensor in TENSORS.items()})
    cache.write(KEYS[3:], {name: tensor[3:] for name, tensor in TENSORS.items()})
    return cache


def test_rows_come_back_bit_for_bit_in_any_order_and_across_shards(tmp_path: Path) -> None:
    written(tmp_path)
    cache = opened(tmp_path)
    assert len(cache) == 5 and all(key in cache for key in KEYS) and b"x" * 16 not in cache
    order = [4, 0, 2, 2]
    answer = cache.read([KEYS[i] for i in order], CPU)
    for name, tensor in TENSORS.items():
        assert answer[name].dtype == tensor.dtype
        assert torch.equal(answer[name].view(torch.uint8), tensor[order].view(torch.uint8)), name
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


def test_a_row_takes_the_bytes_that_are_said(tmp_path: Path) -> None:
    written(tmp_path)
    kinds = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in TENSORS.items()}
    assert row_bytes(kinds) == 3 * (4 * 2 + 4 + 2 * 2) + 24
    size = sum(path.stat().st_size for path in tmp_path.glob("rows-*"))
    assert 5 * row_bytes(kinds) < size < 5 * row_bytes(kinds) + 2 * 1000  # and a header a shard


def test_a_missing_row_is_refused_with_the_counts(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 2 rows are cached; run `kdqat cache RECIPE`.*seq_len"):
        opened(tmp_path).read([KEYS[0], b"?" * 16], CPU)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_a_damaged_shard_is_said_aloud_its_rows_are_missing_and_the_next_filling_drops_it(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path)
    path = next(p for p in tmp_path.glob("rows-*") if p.stat().st_size > 500 and shard_keys(p) == 3)
    good = path.read_bytes()
    path.write_bytes({"cut": good[:-10], "empty": b"", "garbage": b"x" * len(good)}[damage])
    cache = opened(tmp_path)
    assert path.name in caplog.text and "its rows are missing" in caplog.text
    assert [key in cache for key in KEYS] == [False] * 3 + [True] * 2
    cache.begin("a toy")
    assert not path.exists() and len(list(tmp_path.glob("rows-*"))) == 1


def shard_keys(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return len(file.get_tensor("keys"))


def test_a_flipped_bit_is_found_when_its_row_is_read(tmp_path: Path) -> None:
    written(tmp_path)
    (path,) = (p for p in tmp_path.glob("rows-*") if shard_keys(p) == 2)
    good = bytearray(path.read_bytes())
    place = good.find(TENSORS["tail"][4].numpy().tobytes())
    good[place] ^= 1
    path.write_bytes(good)
    cache = opened(tmp_path)
    cache.read(KEYS[:4], CPU)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged; delete it and run `kdqat cache RECIPE`"):
        cache.read(KEYS, CPU)


def test_a_shard_of_another_teacher_is_left_alone_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = opened(tmp_path / "other", k=5)
    other.begin("another toy")
    other.write(KEYS, TENSORS)
    (shard,) = (tmp_path / "other").glob("rows-*")
    written(tmp_path / "mine")
    stray = tmp_path / "mine" / shard.name
    stray.write_bytes(shard.read_bytes())
    cache = opened(tmp_path / "mine")
    cache.begin("a toy")
    assert len(cache) == 5 and stray.exists() and "it belongs to another teacher" in caplog.text


def test_a_folder_of_another_teacher_is_refused_by_what_differs(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ValueError, match=r"another model \(aaaaaaaa, here bbbbbbbb\).*`folder`.*kdqat cache RECIPE"):
        opened(tmp_path, model="b" * 64)
    with pytest.raises(ValueError, match=r"another k \(4, here 8\), another kind \(None, here hidden\)"):
        opened(tmp_path, k=8, kind="hidden")
    (tmp_path / IDENTITY_FILE).write_text('{"identity":')
    with pytest.raises(ValueError, match=r"identity\.json is damaged"):
        opened(tmp_path)


def test_an_identity_that_was_edited_does_not_let_foreign_rows_in(tmp_path: Path) -> None:
    written(tmp_path)
    content = json.loads((tmp_path / IDENTITY_FILE).read_text())
    content["identity"]["k"] = 8
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(content))
    assert len(opened(tmp_path, k=8)) == 0


def test_a_head_comes_back_or_is_refused(tmp_path: Path) -> None:
    cache = written(tmp_path)
    assert cache.read_head() is None
    state = {"weight": torch.randn(7, 3).bfloat16(), "bias": torch.randn(7)}
    cache.write_head(state)
    again = opened(tmp_path).read_head()
    assert again is not None and all(torch.equal(again[name], state[name]) for name in state)
    path = tmp_path / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged"):
        opened(tmp_path).read_head()


def test_temporary_files_that_nobody_writes_any_more_are_removed(tmp_path: Path) -> None:
    written(tmp_path)
    old, new = tmp_path / ".rows-1.safetensors.part", tmp_path / ".rows-2.safetensors.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    opened(tmp_path).begin("a toy")
    assert not old.exists() and new.exists()
