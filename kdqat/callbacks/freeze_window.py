"""Freezing for a number of steps: layers, one block after another, or weights until scales have settled.

`Freeze` is for the whole run, at quantized values; here weights stay where they are when the window opens. Phases are
those of EfficientQAT (https://arxiv.org/abs/2407.11062): block by block, then scales alone.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from kdqat.callbacks.arguments import check_numbers
from kdqat.callbacks.choose import chosen_layers
from kdqat.callbacks.schedule import Schedule, Window, trained
from kdqat.models import blocks_of
from kdqat.quant import FakeQuantizer
from kdqat.student import Student

Part = Literal["all", "weights", "scales"]


class FreezeWindow(Schedule):
    """Does not train the chosen layers from one optimizer step to another.

    Args:
        roles, blocks, layers: which layers of the plan, as `kdqat.models.select_layers`; all of them without one. What
            is tied to a chosen weight rests too.
        start: the first step that does not train them, counted from 0.
        stop: the first step that does again; None: never.
        part: "weights" (biases and adapters with them), the weight quantizers' own "scales" (and zero points), or "all"
            of these.

    Raises:
        ValueError: for a window without steps, or another word.
    """

    def __init__(
        self,
        *,
        roles: list[str] | None = None,
        blocks: list[int] | None = None,
        layers: list[str] | None = None,
        start: int = 0,
        stop: int | None = None,
        part: Part = "all",
    ) -> None:
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"FreezeWindow: 0 <= start < stop is needed, not start {start} and stop {stop}")
        if part not in get_args(Part):
            raise ValueError(f"FreezeWindow: part {part!r} is unknown: use {', '.join(get_args(Part))}")
        super().__init__()
        self.roles, self.blocks, self.layers = roles, blocks, layers
        self.start, self.stop, self.part = start, stop, part

    def windows(self, student: Student) -> list[Window]:
        chosen = chosen_layers(
            student, roles=self.roles, blocks=self.blocks, layers=self.layers, who="FreezeWindow"
        ).values()
        parameters: list[nn.Parameter | None] = []
        for layer in chosen:
            if self.part != "scales":
                parameters += [layer.weight, getattr(layer, "bias", None)]
                parameters += layer.adapter.parameters() if layer.adapter is not None else []  # trained in its place
            if self.part != "weights" and layer.weight_fake_quantizer is not None:
                parameters += layer.weight_fake_quantizer.parameters()
        what = f"FreezeWindow: part {self.part} of roles {self.roles}, blocks {self.blocks}, layers {self.layers}"
        return [Window(self.start, self.stop, trained(parameters, what))]

    def require_matches(self, student: Student) -> None:
        self.windows(student)


class BlockProgressive(Schedule):
    """Trains one block after another, and at last everything.

    Of N blocks, the k-th in order (from 0) trains from step k * steps_per_block on: all that is in it, weights, scales,
    norms and biases. From step N * steps_per_block on everything trains, and only then what lies outside of the blocks:
    embeddings, head and final norm.

    Args:
        steps_per_block: optimizer steps.
        order: which end comes first.
        keep_trained: blocks go on training when the next one begins; False: they rest until everything trains.

    Raises:
        ValueError: without steps, or for another word.
    """

    def __init__(
        self,
        *,
        steps_per_block: int,
        order: Literal["first_to_last", "last_to_first"] = "first_to_last",
        keep_trained: bool = True,
    ) -> None:
        check_numbers("BlockProgressive", steps_per_block=steps_per_block)
        if order not in ("first_to_last", "last_to_first"):
            raise ValueError(f"BlockProgressive: order {order!r} is unknown: use first_to_last or last_to_first")
        super().__init__()
        self.steps_per_block, self.order, self.keep_trained = steps_per_block, order, keep_trained

    def windows(self, student: Student) -> list[Window]:
        blocks = list(blocks_of(student.model))
        end = len(blocks) * self.steps_per_block
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        windows = []
        for k, block in enumerate(blocks if self.order == "first_to_last" else blocks[::-1]):
            start = k * self.steps_per_block
            parameters = [p for p in block.parameters() if p.requires_grad]
            windows += [Window(0, start, parameters)] if start else []
            if not self.keep_trained and start + self.steps_per_block < end:
                windows.append(Window(start + self.steps_per_block, end, parameters))
        outside = [p for p in student.model.parameters() if p.requires_grad and id(p) not in inside]
        windows.append(Window(0, end, outside))
        trained([p for window in windows for p in window.parameters], "BlockProgressive")
        return windows


class ScalesFirst(Schedule):
    """Trains scales alone before anything else, so that weights do not move after a grid that is still moving.

    Scales are what fake quantizers own, those of activations and zero points among them. The other way round, weights
    first and then scales alone, is `FreezeWindow` with `part: weights` and a `start`; scales from the first step to the
    last are `model.trainable: scales`, which also saves the memory of the weights' gradients.

    Args:
        steps: optimizer steps in which only scales train.
        then: what trains afterwards: "all", or "weights", everything but the scales.

    Raises:
        ValueError: without steps, or for another word.
    """

    def __init__(self, *, steps: int, then: Literal["all", "weights"] = "all") -> None:
        check_numbers("ScalesFirst", steps=steps)
        if then not in ("all", "weights"):
            raise ValueError(f"ScalesFirst: then {then!r} is unknown: use all or weights")
        super().__init__()
        self.steps, self.then = steps, then

    def windows(self, student: Student) -> list[Window]:
        owned = [p for m in student.model.modules() if isinstance(m, FakeQuantizer) for p in m.parameters()]
        try:
            scales = trained(owned, "ScalesFirst")
        except ValueError:
            raise ValueError(
                "ScalesFirst: no fake quantizer has scales to train: take LSQ, SEQ or LearnedClipping as quantizer"
            ) from None
        known = {id(p) for p in owned}
        weights = trained([p for p in student.model.parameters() if id(p) not in known], "ScalesFirst: the weights")
        windows = [Window(0, self.steps, weights)]
        return windows if self.then == "all" else [*windows, Window(self.steps, None, scales)]
