"""What the observers of layers share: which layers they look at, when, and what they ask of the trainer."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import lightning as L

from kdqat.models import layer_refs, select_layers
from kdqat.student import Student
from kdqat.training.grid import GridRows, grid_rows
from kdqat.training.probe import Probe, ProbePass
from kdqat.training.probe.probe import probed_layers
from kdqat.training.signals import SignalRecorder
from kdqat.types import LayerRef


def check_numbers(who: str, **numbers: int | None) -> None:
    """
    Raises:
        ValueError: for a number below 1, naming the key.
    """
    for key, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{who}: {key} must be at least 1, not {value}")


def chosen_layers(
    student: Student,
    who: str,
    *,
    roles: Collection[str] | None,
    blocks: Collection[int] | None,
    layers: Collection[str] | None,
) -> list[LayerRef]:
    """The fake-quantized layers to look at; errors as `select_layers`."""
    return select_layers(student.refs, roles=roles, blocks=blocks, layers=layers, who=who)


def offer_batch(probe: Probe, saved: Any, trainer: L.Trainer, batch: Any) -> None:
    """Make sure that the probe has a batch: the one a checkpoint brought, or a corner of this one."""
    if probe.batch is None and saved is not None:
        probe.take(saved)
    probe.offer(batch, partial(trainer.strategy.broadcast, src=0))


def pass_of(probe: Probe, trainer: L.Trainer, module: Any) -> ProbePass:
    """This step's pass of the probe over all layers that it can see."""
    planned = module.student.layers
    refs = probed_layers(module.split, layer_refs(module.student.model), planned)
    return probe.at(
        trainer.global_step,
        module.split,
        refs,
        teacher=module.teacher,
        loss=module.loss,
        context=trainer.precision_plugin.forward_context,
    )


def grid_of_step(
    recorder: SignalRecorder, moment: str, module: Any, refs: list[LayerRef], max_rows: int | None
) -> list[GridRows]:
    """The weights of `refs` on their grid, "before" or "after" this step's update; read once for all observers."""
    key = (moment, tuple(ref.name for ref in refs), max_rows)
    if key not in recorder.grid:
        recorder.grid[key] = list(grid_rows(module.split, refs, module.student.layers, max_rows))
    return recorder.grid[key]
