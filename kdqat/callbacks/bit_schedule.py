"""BitSchedule: layers start with many bits and come down to their plan's while they train.

A network that is brought to 2 bits at once has to undo a large error; brought there in steps, or layer by layer with
the least important ones first, every error is small when it comes (progressive quantization, as in Incremental Network
Quantization, https://arxiv.org/abs/1702.03044; which layer matters is `kdqat score`'s question, docs/layerwise.md).
Bits follow from `trainer.global_step` alone, so that a resumed run does the same.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import lightning as L

from kdqat.allocate.budget import read_scores
from kdqat.callbacks.bit_change import change_bits, current_bits
from kdqat.callbacks.bit_steps import (
    Shape,
    Steps,
    bits_at,
    by_milestones,
    progressive_steps,
    ranked_steps,
)
from kdqat.callbacks.choose import chosen_layers
from kdqat.quant import FakeQuantizer, Fixed, QuantizedLayer
from kdqat.spec import Scores
from kdqat.training import Checkpoints, Steer

log = logging.getLogger(__name__)


class BitSchedule(Steer):
    """Changes the bits of weights over optimizer steps, counted from 0, and ends on those of the plan.

    Exactly one of `milestones`, `progressive` and `scores` says when. At a change the layer's scales are searched anew
    on the live latent weights and the optimizer forgets their moments (`bit_change.py`). Logs `bits/average`, nominal
    bits per weight over all layers of the plan. The student that is left has the plan's bits, whatever ended training.

    Args:
        milestones: step -> bits from there on; null: the plan's own. Before the first step named: the plan's.
        progressive: widths one after another, the first at step 0, the last at `until`; null as above. No layer gets
            fewer bits than its plan says.
        until: of `progressive`.
        scores: a `scores.json`, or the folder that holds one; in Python also the scores. Every layer begins with
            `first_bits` and goes to its plan's bits with its unit, the least important one at `start`, the most
            important one at `stop`.
        first_bits, start, stop: of `scores`.
        shape: how changes are spread: evenly, or as under a cosine, seldom at both ends.
        roles, blocks, layers: which layers of the plan, as `kdqat.models.select_layers`; all of them without one. What
            is tied to a chosen weight goes with it; the others have their plan's bits throughout.

    Raises:
        ValueError: for arguments that do not go together; at the start of training, naming the layer, for one whose
            format is not intN, which is frozen, which has no score or does not end on its plan's bits; for a schedule
            that changes nothing, or is longer than the run.
    """

    def __init__(
        self,
        *,
        milestones: dict[int, int | None] | None = None,
        progressive: list[int | None] | None = None,
        until: int | None = None,
        scores: str | Scores | None = None,
        first_bits: int = 8,
        start: int = 0,
        stop: int | None = None,
        shape: Shape = "linear",
        roles: list[str] | None = None,
        blocks: list[int] | None = None,
        layers: list[str] | None = None,
    ) -> None:
        if sum(given is not None for given in (milestones, progressive, scores)) != 1:
            raise ValueError("BitSchedule: give one of milestones, progressive and scores, and only one")
        if (progressive is None) != (until is None) or (scores is None) != (stop is None):
            raise ValueError("BitSchedule: progressive and until go together, and scores and stop")
        if scores is None and (first_bits, start) != (8, 0):
            raise ValueError("BitSchedule: first_bits and start go with scores")
        if shape not in get_args(Shape):
            raise ValueError(f"BitSchedule: shape {shape!r} is unknown: use {' or '.join(get_args(Shape))}")
        if milestones is not None and (not milestones or min(milestones) < 0):
            raise ValueError("BitSchedule: milestones are steps from 0 on, e.g. {0: 8, 200: 4, 400: null}")
        if progressive is not None and until is not None and not 2 <= len(progressive) <= until + 1:
            raise ValueError("BitSchedule: progressive needs two widths or more, and `until` a step for each change")
        if stop is not None and not 0 <= start < stop:
            raise ValueError(f"BitSchedule: 0 <= start < stop is needed, not start {start} and stop {stop}")
        for bits in (*(milestones or {}).values(), *(progressive or ()), first_bits):
            if bits is not None and not 1 <= bits <= 8:
                raise ValueError(f"BitSchedule: bits are 1 to 8, or null for the plan's, not {bits}")
        self.milestones, self.progressive, self.until = milestones, progressive, until
        self.scores, self.first_bits, self.start, self.stop = scores, first_bits, start, stop
        self.shape: Shape = shape
        self.select: dict[str, Any] = {"roles": roles, "blocks": blocks, "layers": layers}
        self._ranked: Scores | None = None
        self._layers: dict[str, QuantizedLayer] = {}  # scheduled ones, one of those that share a quantizer
        self._plan: dict[str, int] = {}
        self._steps: dict[str, Steps] = {}
        self._now: dict[str, int] = {}

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, BitSchedule) for callback in callbacks) > 1:
            raise ValueError("BitSchedule: list one of them; several would not agree on what a layer has")
        if any(isinstance(callback, Checkpoints) and callback.select == "best" for callback in callbacks):
            raise ValueError(
                "BitSchedule: Checkpoints with select: best would keep weights of the steps with the most bits, which "
                "are not the plan's; set select: last"
            )
        if self.scores is not None:
            self._ranked, _ = read_scores(self.scores)

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        chosen = chosen_layers(module.student, **self.select, who="BitSchedule")
        self._layers = {}
        for name, layer in chosen.items():
            self._require_integer(name, layer)
            if all(layer.weight_fake_quantizer is not other.weight_fake_quantizer for other in self._layers.values()):
                self._layers[name] = layer
        self._plan = {name: int(quantizer.spec.bits) for name, quantizer in self._quantizers().items()}
        self._steps = self._scheduled(chosen)
        for name, steps in self._steps.items():
            self._require_widths(name, steps)
        last = max((steps[-1][0] for steps in self._steps.values() if steps), default=None)
        if last is None:
            raise ValueError("BitSchedule: no layer ever has other bits than its plan says: there is nothing to do")
        if last >= trainer.estimated_stepping_batches:
            raise ValueError(
                f"BitSchedule: the last change is at step {last} and the run has {trainer.estimated_stepping_batches} "
                "steps: without a step at the plan's bits the student would be exported as it was never trained; "
                "end the schedule earlier, or raise trainer.max_steps"
            )

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._now = current_bits(self._quantizers())  # of a resumed run those of the last step

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        step = trainer.global_step
        wanted = {name: bits_at(steps, step, self._plan[name]) for name, steps in self._steps.items()}
        self._change(trainer, module, wanted)
        module.log("bits/average", self._average(module))

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        if not self._steps:
            return
        self._now = current_bits(self._quantizers())
        if self._now != self._plan:
            log.warning("BitSchedule: training ended at step %d, before the schedule did", trainer.global_step)
            self._change(trainer, module, self._plan)
        self._layers, self._plan, self._steps, self._now = {}, {}, {}, {}

    def _change(self, trainer: L.Trainer, module: Any, wanted: Mapping[str, int]) -> None:
        wanted = {name: bits for name, bits in wanted.items() if bits != self._now[name]}
        if not wanted:
            return
        kinds = Counter((self._now[name], bits) for name, bits in wanted.items())
        change_bits(module.split, self._layers, wanted, trainer.optimizers)
        self._now |= wanted
        if trainer.is_global_zero:
            said = ", ".join(f"{count} layers from {old} to {new} bits" for (old, new), count in kinds.items())
            log.info("BitSchedule: step %d: %s; %.3f on average", trainer.global_step, said, self._average(module))

    def _average(self, module: Any) -> float:
        """Nominal bits per weight of all planned weights, shared ones once."""
        now = {id(quantizer): self._now[name] for name, quantizer in self._quantizers().items()}
        quantizers = [layer.weight_fake_quantizer for layer in module.student.layers.values()]
        planned = {id(quantizer): quantizer for quantizer in quantizers if quantizer is not None}
        numel = sum(quantizer.shape.numel() for quantizer in planned.values())
        return sum(q.shape.numel() * now.get(key, q.spec.bits) for key, q in planned.items()) / numel

    def _quantizers(self) -> dict[str, FakeQuantizer]:
        found = {name: layer.weight_fake_quantizer for name, layer in self._layers.items()}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def _scheduled(self, chosen: Mapping[str, QuantizedLayer]) -> dict[str, Steps]:
        if self.milestones is not None:
            return {name: by_milestones(self.milestones, plan) for name, plan in self._plan.items()}
        if self.progressive is not None and self.until is not None:
            widths, until = self.progressive, self.until
            return {name: progressive_steps(widths, until, self.shape, plan) for name, plan in self._plan.items()}
        assert self._ranked is not None and self.stop is not None
        units = self._units(self._ranked, chosen)
        return ranked_steps(units, self.first_bits, self.start, self.stop, self.shape, self._plan)

    def _units(self, scores: Scores, chosen: Mapping[str, QuantizedLayer]) -> Sequence[Sequence[str]]:
        """Scheduled layers, the least important unit first."""
        unit_of = scores.unit_of()
        unscored = [name for name in self._layers if name not in unit_of]
        if unscored:
            raise ValueError(
                f"BitSchedule: layer {unscored[0]} has no score ({len(unscored)} have none): choose layers that have "
                "one by roles, blocks or layers; or score this model"
            )
        units = [[name for name in scores.members[unit] if name in self._layers] for unit in scores.ranking()[::-1]]
        return [unit for unit in units if unit]

    def _require_integer(self, name: str, layer: QuantizedLayer) -> None:
        quantizer = layer.weight_fake_quantizer
        if quantizer is None or not quantizer.spec.format.startswith("int"):
            what = "in full precision" if quantizer is None else f"in format {quantizer.spec.format}"
            raise ValueError(
                f"BitSchedule: layer {name} is {what}; only intN formats change their bits: leave it out by roles, "
                "blocks or layers"
            )
        if isinstance(quantizer, Fixed) and not layer.weight.requires_grad:
            raise ValueError(
                f"BitSchedule: layer {name} is frozen, its scale with it: leave it out here, or out of Freeze"
            )

    def _require_widths(self, name: str, steps: Steps) -> None:
        quantizer, plan = self._quantizers()[name], self._plan[name]
        for _, bits in steps:
            try:
                quantizer.spec.qrange(bits)
            except ValueError as error:
                raise ValueError(f"BitSchedule: layer {name}: {error}") from None
        if steps and steps[-1][1] != plan:
            raise ValueError(
                f"BitSchedule: layer {name} ends with {steps[-1][1]} bits, and its plan says {plan}: it is exported as "
                f"planned, so let the schedule end with null or {plan}"
            )
