"""Files and folders appear whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from kdqat import files
from kdqat.files import whole_file, whole_folder, write_text


def everything(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def full_disk(monkeypatch):
    """Call it and the next fsync finds the disk full, which is where late write errors surface."""

    def now() -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", fsync)

    return now


def test_text_is_written_and_replaced_and_parents_are_made(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "one")
    write_text(path, "zwölf\n")
    assert everything(tmp_path) == {"a/b.txt": "zwölf\n".encode()}


def test_until_the_end_a_reader_sees_the_old_file(tmp_path):
    write_text(tmp_path / "f", "old")
    with whole_file(tmp_path / "f") as part:
        part.write_text("new, half wr")
        assert part.parent == tmp_path and (tmp_path / "f").read_text() == "old"
    assert everything(tmp_path) == {"f": b"new, half wr"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_error_while_writing_a_file_leaves_what_was_there(tmp_path, error, old):
    if old:
        write_text(tmp_path / "f", old)
    before = everything(tmp_path)
    with pytest.raises(error), whole_file(tmp_path / "f") as part:
        part.write_text("half")
        raise error
    assert everything(tmp_path) == before and len(list(tmp_path.iterdir())) == len(before)


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path, full_disk):
    write_text(tmp_path / "f", "old")
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "f", "new")
    assert everything(tmp_path) == {"f": b"old"}


def test_a_file_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (order.append("sync"), fsync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_text(tmp_path / "f", "x")
    assert order == ["sync", "rename", "sync"]  # the file, its name, the folder that holds the name
    order.clear()
    with whole_folder(tmp_path / "d") as part:
        (part / "a").write_text("a")
        (part / "b").write_text("b")
    assert order == ["sync", "sync", "rename", "sync"]


def test_a_folder_appears_with_everything_in_it_at_once(tmp_path):
    with whole_folder(tmp_path / "runs" / "out") as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("a")
        assert not (tmp_path / "runs" / "out").exists()
    assert everything(tmp_path) == {"runs/out/sub/a": b"a"}


def test_an_existing_folder_is_refused_unless_it_may_be_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(FileExistsError, match="out exists already"), whole_folder(tmp_path / "out"):
        pass
    assert everything(tmp_path) == {"out/old": b"old"}
    with whole_folder(tmp_path / "out", overwrite=True) as part:
        (part / "new").write_text("new")
        assert (tmp_path / "out" / "old").exists()
    assert everything(tmp_path) == {"out/new": b"new"} and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_a_folder_leaves_what_was_there(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "new") as part:
        (part / "a").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "out") as part:
        (part / "a").write_text("old")
    with pytest.raises(error), whole_folder(tmp_path / "out", overwrite=True) as part:
        (part / "a").write_text("half")
        raise error
    assert everything(tmp_path) == {"out/a": b"old"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_folder(tmp_path, full_disk):
    with whole_folder(tmp_path / "out") as part:
        (part / "a").write_text("old")
    full_disk()
    with pytest.raises(OSError, match="No space left"), whole_folder(tmp_path / "out", overwrite=True) as part:
        (part / "a").write_text("new")
    assert everything(tmp_path) == {"out/a": b"old"}


def test_if_the_new_folder_cannot_take_the_name_the_old_one_gets_it_back(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "out") as part:
        (part / "a").write_text("old")
    replace = os.replace

    def refuse_the_new_one(source, target):
        if str(source).endswith(".part"):
            raise OSError(errno.EIO, "I/O error")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse_the_new_one)
    with pytest.raises(OSError, match="I/O error"), whole_folder(tmp_path / "out", overwrite=True) as part:
        (part / "a").write_text("new")
    assert everything(tmp_path) == {"out/a": b"old"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_behind_is_cleared_away(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "rubbish").write_text("rubbish")
    (tmp_path / ".f.part").write_text("rubbish")
    with whole_folder(tmp_path / "out") as part:
        assert list(part.iterdir()) == []
        (part / "a").write_text("a")
    write_text(tmp_path / "f", "f")
    assert everything(tmp_path) == {"out/a": b"a", "f": b"f"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_of_a_folder_may_be_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as part:
            save_file({"x": torch.ones(1)}, part / "model.safetensors")  # for the owner alone
            (part / "sub").mkdir()
            (part / "sub" / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [mode] * 2
    assert os.access(tmp_path / "out" / "sub", os.X_OK)
