"""What the observers of layers share: which layers they look at, when, and what they ask of the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L

from kdqat.models import layer_refs, select_layers
from kdqat.student import Student
from kdqat.training.edits import Observer
from kdqat.training.grid import GridRows, grid_rows
from kdqat.training.probe import Probe, ProbePass
from kdqat.training.probe.passes import probed_layers
from kdqat.training.signals import SignalRecorder, recorder_of
from kdqat.types import LayerRef


class LayerObserver(Observer, ABC):
    """Looks at chosen layers of the plan every so many steps, and notes what it finds with the run's recorder.

    What it looks at and how often tells its state apart in a checkpoint.

    Args:
        every_n_steps: optimizer steps between measurements, from step 0.
        roles, blocks, layers: which layers; see `select_layers`. None: all.
        further: other periods that it has.
    """

    def __init__(
        self,
        *,
        every_n_steps: int,
        roles: Sequence[str] | None,
        blocks: Sequence[int] | None,
        layers: Sequence[str] | None,
        **further: int | None,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.select: dict[str, Any] = {"roles": roles, "blocks": blocks, "layers": layers}
        self._further = further
        self._recorder: Any = None
        self._refs: list[LayerRef] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps, **self._further, **self.select)

    @abstractmethod
    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Find the recorder and the layers; each observer adds what it prepares."""
        self._recorder = recorder_of(trainer, type(self).__name__)
        self._refs = self._chosen(module.student)

    def require_matches(self, student: Student) -> None:
        self._chosen(student)

    def _chosen(self, student: Student) -> list[LayerRef]:
        return select_layers(student.refs, **self.select, who=type(self).__name__)

    def _due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0


def offer_batch(probe: Probe, saved: Any, trainer: L.Trainer, batch: Any) -> None:
    """Make sure that the probe has a batch: the one a checkpoint brought, or a corner of this one."""
    if probe.batch is None and saved is not None:
        probe.take(saved)
    probe.offer(batch, partial(trainer.strategy.broadcast, src=0))


def is_whole_step(trainer: L.Trainer) -> bool:
    """In `on_after_backward`: whether no micro-batch of this step is to come.

    That is where to look with the probe. The weights are those of the step, and the GPU still computes the backward
    pass while the probe's many small kernels are launched; later the module has waited for the loss.
    """
    return not trainer.fit_loop._should_accumulate()


def pass_of(probe: Probe, trainer: L.Trainer, module: Any) -> ProbePass:
    """This step's pass of the probe over all layers that it can see."""
    student = module.student
    return probe.at(
        trainer.global_step,
        module.split,
        lambda: probed_layers(module.split, layer_refs(student.model), student.layers),
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
