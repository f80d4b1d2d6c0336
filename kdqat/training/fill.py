"""Fill a teacher's cache: ask the live teacher about every row of the data that is not there yet.

The size is known before the teacher is loaded, and so is whether anything is missing. Filling can stop at any moment:
what was answered is on disk, and the next call goes on with the rest.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdqat.data import Rows, TextData
from kdqat.models import CachedTeacher, ModelSource
from kdqat.models.head_only import head_only
from kdqat.types import Batch

log = logging.getLogger(__name__)

_GIB = 1 << 30
_SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


def fill_cache(
    source: ModelSource,
    teacher: CachedTeacher,
    data: TextData,
    *,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Answer the rows of `data` that `teacher` has no answers to; returns how many are missing still.

    Args:
        source: the student's: its tokenizer makes the rows, and a teacher without a path is its model.
        device: where the live teacher computes, `data.batch_size` rows at a time.
        stop: asked after every batch.

    Raises:
        ValueError: if the answers do not fit on the disk, or the folder holds those of another teacher.
    """
    student, tokenizer = head_only(source.load_config(), source), source.load_tokenizer()
    data.bind(tokenizer, getattr(student.model.config, "max_position_embeddings", None))
    teacher.prepare(source, student, tokenizer, pristine=False)
    assert teacher.cache is not None
    folder = teacher.cache.folder
    todo = _missing(teacher, data)
    num_missing, num_rows = (sum(len(index) for _, index in todo), sum(len(rows) for rows, _ in todo))
    if not num_missing:
        log.info("teacher cache %s is complete: %d rows", folder, num_rows)
        return 0
    need = num_missing * teacher.row_bytes(data.seq_len)
    free = shutil.disk_usage(_existing(folder)).free
    log.info(
        "teacher cache %s: %d of %d rows are to be answered; they take %.3f GiB, %.1f GiB are free",
        folder, num_missing, num_rows, need / _GIB, free / _GIB,
    )  # fmt: skip
    if need > free:
        raise ValueError(
            f"teacher cache {folder}: {num_missing} rows need {need / _GIB:.3f} GiB, {free / _GIB:.3f} GiB are free: "
            "use another `folder`, kind: top_k with a smaller k, or fewer rows"
        )
    live = teacher.judge()
    live.prepare(source, student, tokenizer, pristine=False)
    live.place(device)
    batches = (move_data_to_device(batch, device) for batch in _batches(todo, data.batch_size))
    done = 0
    with closing(teacher.fill(batches)) as answered, _Progress(num_missing) as progress:
        for num in answered:
            done += num
            progress.show(done)
            if stop():
                break
    live.release()
    return num_missing - done


def _missing(teacher: CachedTeacher, data: TextData) -> list[tuple[Rows, torch.Tensor]]:
    """For training and for validation rows which of them to ask about; a row that comes twice is asked about once."""
    found, seen = [], set[bytes]()
    for rows in data.all_rows():
        keys = rows.row_keys()
        found.append((rows, torch.tensor([n for n in teacher.missing(keys) if keys[n] not in seen])))
        seen.update(keys)
    return found


def _batches(todo: list[tuple[Rows, torch.Tensor]], batch_size: int) -> Iterator[Batch]:
    for rows, missing in todo:
        for index in missing.split(batch_size) if len(missing) else ():
            yield rows.batch(index)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


class _Progress:
    """Rows answered, rows a second, time left: a bar on a terminal, else a line every few seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.console = Console(stderr=True)
        columns = (TextColumn("row {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[text]}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("cache", total=total, text="")
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int) -> None:
        """`done` rows are answered."""
        now = time.monotonic()
        rate = done / max(now - self.started, 1e-9)
        self.bar.update(self.task, completed=done, text=f"{rate:,.1f} rows/s")
        last = done == self.total
        if self.bar.disable is False or (now - self.shown < _SECONDS_BETWEEN_LINES and not last):
            return
        self.shown = now
        left = (self.total - done) / rate / 60
        self.console.print(f"row {done}/{self.total}  {rate:,.1f} rows/s  {left:.1f} min left", highlight=False)
