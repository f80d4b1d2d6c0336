"""Student against teacher on a fixed probe batch: what quantization does to the signal, layer by layer.

Step 0 is before the first update, so it shows what post-training quantization alone has broken ("Oh! We Freeze",
https://arxiv.org/abs/2403.18159, compares activations so). docs/signals.md has every formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from kdqat.callbacks.arguments import check_numbers
from kdqat.callbacks.observed import LayerObserver, is_whole_step, offer_batch, pass_of
from kdqat.training.probe import Probe, require_live
from kdqat.training.tables import places_of, signal_values
from kdqat.types import LayerRef


class SignalLog(LayerObserver):
    """Logs of every layer and block, teacher against student: sqnr_db, gain, cosine, mean_abs, variance, max_abs (and
    teacher_*), and of attention the entropy. One pass of the probe each time, shared with GradientLog's.

    Args:
        every_n_steps: optimizer steps between measurements, from step 0, before the first update.
        roles, blocks, layers: which layers; see `select_layers`. None: all, and the blocks' own outputs and attention.
        attention: look at attention's entropy; both models then run eager attention in the probe.
        num_rows, num_tokens: of the probe's batch.

    Raises:
        ValueError: for numbers below 1; at the start of training without a live teacher of the student's architecture,
            or for a selection that matches nothing.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 20,
        roles: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
        layers: Sequence[str] | None = None,
        attention: bool = True,
        num_rows: int = 1,
        num_tokens: int = 256,
    ) -> None:
        check_numbers("SignalLog", every_n_steps=every_n_steps, num_rows=num_rows, num_tokens=num_tokens)
        super().__init__(every_n_steps=every_n_steps, roles=roles, blocks=blocks, layers=layers)
        self.attention, self.num_rows, self.num_tokens = attention, num_rows, num_tokens
        self._places: dict[str, LayerRef] = {}
        self._probe_batch: Any = None

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        if stage == "fit":
            require_live(module.teacher, "SignalLog")

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        everything, refs = not any(self.select.values()), self._refs
        self._places = places_of(module.student.model, refs) if everything else {ref.name: ref for ref in refs}
        probe = self._probe()
        probe.attention |= self.attention
        probe.compares = True

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        offer_batch(self._probe(), self._probe_batch, trainer, batch)

    @torch.no_grad()
    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        if not self._due(trainer) or not is_whole_step(trainer):
            return
        seen = pass_of(self._probe(), trainer, module)
        for metric, refs, values in signal_values(seen, self._probe().positions, self._places):
            self._recorder.add(trainer.global_step, "signal", metric, refs, values)

    def state_dict(self) -> dict[str, Any]:
        return {"probe": None if self._recorder is None else self._probe().state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._probe_batch = state_dict["probe"]

    def _probe(self) -> Probe:
        return self._recorder.probe(self.num_rows, self.num_tokens)
