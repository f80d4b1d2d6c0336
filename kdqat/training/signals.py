"""What observers measured: buffered on the device, written to RUN/signals.parquet and the loggers.

A row of the file is one value: step, source ("gradient", "signal", "oscillation", "guard"), metric, block (-1: outside
of blocks), role ("block": a block's own output, "attention": its attention weights, "": of the whole model), layer
(full name) and value. Loggers get what a curve can show: per role the mean over its layers (of max_*: the maximum), as
grad/o/energy, and grad/all/energy over all roles. The loggers are called by step and not through `module.log`, whose
values are only written at multiples of `log_every_n_steps`; and while the device computes the step after, so that
nobody waits for values or for the tables made of them.

The step is the number of optimizer steps made before: a row of step 0 is about the student before its first update.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch
from torch import Tensor

from kdqat.files import whole_file
from kdqat.training.edits import Observer
from kdqat.training.grid import GridRows
from kdqat.training.probe import Probe
from kdqat.types import LayerRef

log = logging.getLogger(__name__)

FILE = "signals.parquet"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("source", pa.string()),
        ("metric", pa.string()),
        ("block", pa.int32()),
        ("role", pa.string()),
        ("layer", pa.string()),
        ("value", pa.float64()),
    ]
)
PREFIX = {"gradient": "grad"}  # of the loggers' names; a source stands for itself otherwise


class _Pending(NamedTuple):
    step: int
    source: str
    metric: str
    places: Sequence[LayerRef | None]
    values: Tensor


class _Arriving(NamedTuple):
    pending: list[_Pending]
    values: Tensor  # of all of them, on the CPU once `copied` is over
    copied: torch.cuda.Event | None


class SignalRecorder(Observer):
    """Collects what the observers of one run measure; `make_trainer` adds it where there are observers.

    Args:
        run: the run directory; None keeps everything in memory.

    Attributes:
        grid: rows of the weights on their grid at one moment, for all observers that look at them.
    """

    def __init__(self, run: Path | None = None) -> None:
        self.path = None if run is None else Path(run) / FILE
        self.grid: dict[Any, list[GridRows]] = {}
        self._probes: dict[tuple[int, int], Probe] = {}
        self._pending: list[_Pending] = []
        self._arriving: list[_Arriving] = []
        self._tables: list[pa.Table] = []
        self._unlogged: list[pa.Table] = []

    def probe(self, num_rows: int, num_tokens: int) -> Probe:
        """The run's probe of this size: one for all who ask."""
        return self._probes.setdefault((num_rows, num_tokens), Probe(num_rows, num_tokens))

    def add(self, step: int, source: str, metric: str, places: Sequence[LayerRef | None], values: Tensor) -> None:
        """Note `values` [L] of `places`, on whatever device; nothing waits for it. A place of None: nobody asked.

        A value of the whole model belongs to LayerRef("", None, "", ()).
        """
        self._pending.append(_Pending(step, source, metric, places, values.detach().double()))

    def table(self) -> pa.Table:
        """All rows so far, by SCHEMA."""
        self._read()
        return self._joined()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._tables, self._unlogged, self._pending, self._arriving = [], [], [], []
        if self.path is not None and self.path.is_file() and trainer.global_step and trainer.is_global_zero:
            before = pq.read_table(self.path, schema=SCHEMA)
            self._tables = [before.filter(pyarrow.compute.less(before["step"], trainer.global_step))]

    def on_after_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if self._arriving:  # of the step before: the device is busy with this one
            self._read()
            self._tell(trainer)

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._forget()  # observers come in their order, and this one last

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.grid = {}
        if trainer.is_global_zero:
            self._send()
        self._pending = []

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self._settle(trainer)  # a run that goes on from here does not measure it again

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._settle(trainer)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        for probe in self._probes.values():
            probe.let_go()
        # A run that dies is the one whose signals are wanted; its own error is the one to see.
        try:
            self._read()
        except RuntimeError as error:  # a lost device
            log.warning("the last step's signals could not be read (%s)", str(error).partition("\n")[0])
        try:
            self._settle(trainer)
        except OSError as error:  # a full disk
            log.warning("%s could not be written (%s)", self.path, str(error).partition("\n")[0])

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._forget()
        self._probes, self.grid = {}, {}

    def _forget(self) -> None:
        for probe in self._probes.values():
            probe.forget()

    def _send(self) -> None:
        """Let what is pending go to the CPU, at once; waits for nothing."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        values, copied = torch.cat([item.values.flatten() for item in pending]), None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values, copied = host.copy_(values, non_blocking=True), torch.cuda.Event()
            copied.record()
        self._arriving.append(_Arriving(pending, values, copied))

    def _read(self) -> None:
        """Make tables of all that was noted."""
        self._send()
        arriving, self._arriving = self._arriving, []
        for pending, values, copied in arriving:  # of a lost device none will ever come
            if copied is not None:
                copied.synchronize()
            self._tables.append(_table(pending, values.tolist()))
            self._unlogged.append(self._tables[-1])

    def _settle(self, trainer: L.Trainer) -> None:
        """Write and tell everything there is."""
        self._read()
        try:
            self._write(trainer)
        finally:
            self._tell(trainer)

    def _joined(self) -> pa.Table:
        self._tables = [pa.concat_tables(self._tables)] if self._tables else [SCHEMA.empty_table()]
        return self._tables[0]

    def _tell(self, trainer: L.Trainer) -> None:
        """Give the loggers what they have not had."""
        tables, self._unlogged = self._unlogged, []
        for table in tables if trainer.is_global_zero else []:
            for step, numbers in _curves(table).items():
                for logger in trainer.loggers:
                    logger.log_metrics(numbers, step=step)

    def _write(self, trainer: L.Trainer) -> None:
        if self.path is None or not trainer.is_global_zero:
            return
        table = self._joined()
        if len(table):
            with whole_file(self.path) as part:
                pq.write_table(table, part)


def recorder_of(trainer: L.Trainer, who: str) -> SignalRecorder:
    """
    Raises:
        ValueError: if the trainer has none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SignalRecorder):
            return callback
    raise ValueError(f"{who} needs a SignalRecorder behind it: make the trainer with kdqat.fit or api.make_trainer")


def note(trainer: L.Trainer, step: int, what: str, value: float) -> None:
    """Note a guard's finding of the whole model, where the trainer has a recorder."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SignalRecorder):
            values = torch.tensor([value], device=trainer.strategy.root_device)  # where all others are: read at once
            callback.add(step, "guard", what, [LayerRef("", None, "", ())], values)


def _table(pending: list[_Pending], values: list[float]) -> pa.Table:
    """Rows of what was noted; `values` are those of all of it, in order."""
    columns: list[list[Any]] = [[] for _ in SCHEMA]
    wanted = (place for item in pending for place in item.places)
    for item in pending:
        for ref in item.places:
            if ref is None:
                continue
            block = -1 if ref.block is None else ref.block
            row = (item.step, item.source, item.metric, block, ref.role, ref.name)
            for column, cell in zip(columns, row, strict=False):
                column.append(cell)
    columns[-1] = [value for value, place in zip(values, wanted, strict=True) if place is not None]
    return pa.table(columns, schema=SCHEMA)


def _curves(table: pa.Table) -> dict[int, dict[str, float]]:
    """What loggers get, by step."""
    values: dict[tuple[int, str, str, str], list[float]] = {}
    for row in table.to_pylist():
        for role in {row["role"] or "all", *(["all"] if row["role"] not in ("block", "attention") else [])}:
            values.setdefault((row["step"], row["source"], role, row["metric"]), []).append(row["value"])
    steps: dict[int, dict[str, float]] = {}
    for (step, source, role, metric), several in values.items():
        numbers = [value for value in several if not math.isnan(value)]
        if numbers:
            value = max(numbers) if "max_" in metric else sum(numbers) / len(numbers)
            steps.setdefault(step, {})[f"{PREFIX.get(source, source)}/{role}/{metric}"] = value
    return steps
