"""A module around toy:llama, batches made from numbers, and a quiet trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.initializers import MSEGrid
from kdqat.losses import ForwardKL
from kdqat.models import FrozenTeacher, ModelSource
from kdqat.quant import LSQ
from kdqat.training import KDQATModule
from kdqat.types import IGNORE_INDEX, Batch


def make_module(**changes: Any) -> KDQATModule:
    """A W4 LSQ student of toy:llama under forward KL; changed by constructor arguments."""
    arguments: dict[str, Any] = {
        "student": ModelSource("toy:llama"),
        "plan": Uniform("W4A16_G32"),
        "quantizer": LSQ,
        "loss": ForwardKL(),
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "teacher": FrozenTeacher(dtype="float32"),
        "initializer": MSEGrid(num_steps=4),
    }
    return KDQATModule(**{**arguments, **changes})


def batch(rows: int, tokens: int = 12, *, labelled: int | None = None, seed: int = 0) -> Batch:
    """Random tokens; in row r only the last `labelled` + r of them are labels (None: all)."""
    ids = torch.randint(3, 259, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    if labelled is not None:
        for row in range(rows):
            labels[row, : max(tokens - labelled - row, 0)] = IGNORE_INDEX
    return Batch(ids, labels)


def joined(batches: Sequence[Batch]) -> Batch:
    """One large batch."""
    return Batch(torch.cat([b.input_ids for b in batches]), torch.cat([b.labels for b in batches]))


class Loader:
    """Batches as Lightning takes them; a list of named tuples it would take apart."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def built(**changes: Any) -> KDQATModule:
    """`make_module`'s, ready to run without a trainer."""
    module = make_module(**changes)
    module.build()
    return module


def train(
    module: KDQATModule, batches: Sequence[Batch], *, run: Path | None = None, val: Sequence[Batch] = (), **args: Any
) -> L.Trainer:
    """Train on the batches, in order, once (or until max_steps)."""
    if "max_steps" not in args:
        args["max_epochs"] = 1
    args = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1, **args}
    trainer = api.make_trainer(args, run)
    trainer.fit(module, Loader(batches), Loader(val) if val else None)
    return trainer
