"""Do codes settle, or jump to and fro? Two looks at the weights, one optimizer step apart, every n steps.

A weight near a rounding threshold is pushed over it, and pushed back by the gradient that the other code brings (Nagel
et al. 2022, https://arxiv.org/abs/2203.11086). Codes are those that would be exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from kdqat.callbacks.arguments import check_numbers
from kdqat.callbacks.observed import LayerObserver, grid_of_step
from kdqat.training.grid import GridRows


class OscillationLog(LayerObserver):
    """Logs by layer: flipped (share of codes that one step changed), oscillating (share that flipped against the
    direction of their last recorded flip), near_threshold, clipped, and scale_drift (mean |log2 scale / first scale|).

    It looks at some rows of every weight. Memory on the device, of each weight looked at: 1 byte for the direction of
    its last flip; in a measured step two snapshots of 9 bytes, an int8 code among them (64 rows of all layers of
    Llama-2-7B are 80 million weights: 0.08 GB, and 1.4 GB during a measured step). Directions are not saved: after
    a resume, and after a change of bits, every weight's next flip counts as its first. First scales are saved; scales
    after a change of bits are compared to them too.

    Args:
        every_n_steps: optimizer steps between measurements, from step 0.
        roles, blocks, layers: which layers; see `select_layers`. None: all.
        threshold_share: how near a threshold is near, in steps of the grid.
        max_rows: rows of each weight to look at, evenly spaced; None: all.

    Raises:
        ValueError: for numbers out of range; at the start of training for a selection that matches nothing.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 20,
        roles: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
        layers: Sequence[str] | None = None,
        threshold_share: float = 0.05,
        max_rows: int | None = 64,
    ) -> None:
        check_numbers("OscillationLog", every_n_steps=every_n_steps, max_rows=max_rows)
        if not 0 < threshold_share <= 0.5:
            raise ValueError(f"OscillationLog: threshold_share lies in (0, 0.5], not {threshold_share}")
        super().__init__(every_n_steps=every_n_steps, roles=roles, blocks=blocks, layers=layers)
        self.threshold_share, self.max_rows = threshold_share, max_rows
        self._before: tuple[int, list[GridRows]] | None = None
        # by GridRows.key: directions of the last flips, -1 0 1, and the highest level of the grid they happened on
        self._directions: dict[Any, tuple[Tensor, Tensor]] = {}
        self._first_scales: dict[str, Tensor] = {}  # by layer, on the CPU after a resume

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self._first_scales = {}  # of a run before; a checkpoint's come after this

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        layers = module.student.layers
        self._refs = [ref for ref in self._refs if layers[ref.name].weight_fake_quantizer is not None]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Optimizer) -> None:
        if self._due(trainer):
            rows = grid_of_step(self._recorder, "before", module, self._refs, self.max_rows)
            self._before = trainer.global_step, rows

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if self._before is None:
            return
        (step, before), self._before = self._before, None
        after = grid_of_step(self._recorder, "after", module, self._refs, self.max_rows)
        for old, new in zip(before, after, strict=True):
            for metric, values in self._measured(old, new).items():
                self._recorder.add(step, "oscillation", metric, old.refs, values)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._before, self._directions = None, {}

    def state_dict(self) -> dict[str, Any]:
        return {"first_scales": {name: scale.cpu() for name, scale in self._first_scales.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first_scales = dict(state_dict["first_scales"])

    def _measured(self, old: GridRows, new: GridRows) -> dict[str, Tensor]:
        direction = (new.codes.to(torch.int16) - old.codes).sign().to(torch.int8)
        last = self._last_directions(old)
        against = direction * last
        self._directions[old.key] = torch.where(direction != 0, direction, last), old.high
        clipped = old.offset > 1 + 1e-4  # rounding errors of fp32 are no clipping
        near = ((1 - old.offset).abs() < 2 * self.threshold_share) & ~clipped  # an offset of 1 is half a step
        return {
            "flipped": old.mean(direction != 0),
            "oscillating": old.mean(against < 0),
            "near_threshold": old.mean(near),
            "clipped": old.mean(clipped),
            "scale_drift": old.mean(self._drift(old)),
        }

    def _last_directions(self, rows: GridRows) -> Tensor:
        """[R, N, G]; 0 where no flip was seen since the bits are what they are: other bits have other thresholds."""
        if rows.key not in self._directions:
            return torch.zeros_like(rows.codes)
        last, high = self._directions[rows.key]
        return last * (high == rows.high)

    def _drift(self, rows: GridRows) -> Tensor:
        """|log2 of scale over first scale|, [R, N, 1]."""
        for ref, scale in zip(rows.refs, rows.scale.split(list(rows.counts)), strict=True):
            if ref.name not in self._first_scales:
                self._first_scales[ref.name] = scale.clone()
            elif self._first_scales[ref.name].device != scale.device:
                self._first_scales[ref.name] = self._first_scales[ref.name].to(scale.device)
        first = torch.cat([self._first_scales[ref.name] for ref in rows.refs])
        return (rows.scale / first).abs().log2().abs()
