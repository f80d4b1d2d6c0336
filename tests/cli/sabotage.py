"""What a forked command does to itself before it starts, so that something breaks on purpose."""

from __future__ import annotations

import errno
import io
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch


def hide_datasets() -> None:
    """As if the `datasets` package were not installed."""
    _hide("datasets")


def hide_torchao() -> None:
    """As if torchao were not installed."""
    _hide("torchao")


def _hide(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]

    class Hidden:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    sys.meta_path.insert(0, Hidden)  # type: ignore[arg-type]


def slow_saves() -> None:
    """Every checkpoint is written in two halves with a pause between them, so that a kill can fall into it."""
    save = torch.save

    def in_halves(content: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        whole = io.BytesIO()
        save(content, whole, *args, **kwargs)
        data = whole.getvalue()
        with open(path, "wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            time.sleep(0.4)
            file.write(data[len(data) // 2 :])

    torch.save = in_halves


def slow_end() -> None:
    """Training is over, its last checkpoint written, but student/ takes its time."""
    from kdqat.cli import verbs

    save = verbs.save

    def late(student: Any, folder: Path) -> None:
        folder.with_name("training_is_over").touch()
        time.sleep(1.0)
        save(student, folder)

    verbs.save = late


def slow_steps() -> None:
    """A training step takes at least 50 ms."""
    from kdqat.training import KDQATModule

    step = KDQATModule.training_step

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(0.025)
        return step(self, *args)

    KDQATModule.training_step = slow  # type: ignore[method-assign]


def slow_validation() -> None:
    """Validation takes long to begin: a checkpoint of the same step is there already."""
    from kdqat.training import KDQATModule

    def begin(self: Any) -> None:
        Path("run/validating").touch()
        time.sleep(1.0)

    KDQATModule.on_validation_epoch_start = begin  # type: ignore[method-assign]


def full_disk() -> None:
    """The disk is full from the second checkpoint on: half of it is written, then it fails."""
    save, count = torch.save, itertools.count(1)

    def fails(content: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        save(content, path, *args, **kwargs)
        if next(count) >= 2:
            with open(path, "r+b") as file:
                file.truncate(1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.save = fails


def slow_source() -> None:
    """Loading the model takes long."""
    from kdqat.models import ModelSource

    def slow(self: Any) -> Any:
        Path("loading").touch()
        time.sleep(10)

    ModelSource.load_model = slow  # type: ignore[method-assign]


def forget_the_data() -> None:
    """A resumed run begins its data again."""
    from kdqat.data import BlockLoader

    BlockLoader.load_state_dict = lambda self, state_dict: None  # type: ignore[method-assign]


def forget_the_moments() -> None:
    """A resumed run begins its optimizer's moments again."""
    torch.optim.AdamW.load_state_dict = lambda self, state_dict: None  # type: ignore[method-assign]
