"""OutputKL: what quantizing one unit does to the model's answers, measured. The strongest score, and the dearest.

Leave-one-in quantizes one unit with each candidate scheme and takes the KL of the whole model's next-token distribution
from that of the full-precision model, on the score's text. The model runs from the changed block on only: what comes
before is known. Costs of units add up approximately; interactions are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar, Literal, get_args

from torch import Tensor

from kdqat.calibrate import BlockCall, stream_blocks
from kdqat.calibrate.capture import token_mask
from kdqat.importance.base import Costs, ImportanceScorer, Measured, Units, candidates, check_unit, gain
from kdqat.importance.gradients import require_language_model
from kdqat.importance.tail import Tail, sum_kl
from kdqat.importance.weights import LayerWeight, Start, check_start, find_weights, quantized, replaced
from kdqat.models import SplitModel
from kdqat.spec import LayerScheme, Unit, scheme_names
from kdqat.types import Batch

Mode = Literal["leave_one_in", "leave_one_out"]


class OutputKL(ImportanceScorer):
    """Mean KL[full precision; quantized] per token, in nats, with one unit quantized.

    Importance is what the candidate with the most bits saves over that with the fewest.

    Args:
        schemes: candidates, one or more; their weights are measured, activations stay in full precision.
        mode: "leave_one_in": all other units in full precision; "leave_one_out": all others at the candidate with the
            fewest bits, and costs are counted from this unit in full precision.
        start: scales of the copies: "rtn" from the range, "mse" those of least weight error.
        unit: "block" or "layer".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __init__(
        self,
        schemes: Sequence[str | LayerScheme | dict],
        *,
        mode: Mode = "leave_one_in",
        start: Start = "mse",
        unit: Unit = "block",
    ) -> None:
        if not schemes:
            raise ValueError("OutputKL: give schemes to measure, e.g. [W4A16_G64, W2A16_ASYM_G64]")
        if mode not in get_args(Mode):
            raise ValueError(f"OutputKL: mode is {' or '.join(get_args(Mode))}, not {mode!r}")
        self.schemes, self.mode = candidates(self, schemes), mode
        self.start, self.unit = check_start("OutputKL", start), check_unit(self, unit)

    def measure(self, split: SplitModel, units: Units, batches: Sequence[Batch]) -> Measured:
        require_language_model("OutputKL", split)
        weights = find_weights(split.model, [name for layers in units.values() for name in layers])
        answers = Answers(split, batches)
        cost: Costs = {}
        with ExitStack() as stack:
            originals = {}
            if self.mode == "leave_one_out":
                originals = {name: weight.parameter.detach().clone() for name, weight in weights.items()}
                lowest = {name: quantized(weight, self.schemes[-1], self.start) for name, weight in weights.items()}
                stack.enter_context(replaced(weights.values(), lowest))
            for call in stream_blocks(split, batches, store=next(split.parameters()).device):
                for unit, layers in units.items():
                    if call.prefix and f"{unit}.".startswith(f"{call.prefix}."):
                        cost[unit] = self._costs([weights[name] for name in layers], originals, call, answers)
        return Measured({unit: gain(cost[unit], self.schemes) for unit in units}, {unit: cost[unit] for unit in units})

    def _costs(
        self, weights: list[LayerWeight], originals: dict[str, Tensor], call: BlockCall, answers: Answers
    ) -> dict[str, float]:
        """Scheme name -> cost of these weights in it; `originals`: all in full precision, where others are low."""
        with replaced(weights, originals):
            full = answers.kl(call) if originals else 0.0
            costs = {}
            for key, scheme in scheme_names(list(self.schemes)).items():
                with replaced(weights, {weight.name: quantized(weight, scheme, self.start) for weight in weights}):
                    costs[key] = answers.kl(call) - full
        return costs


class Answers:
    """What the model answers as it is when this is made, and how far it is from there later."""

    def __init__(self, split: SplitModel, batches: Sequence[Batch]) -> None:
        self._split, self._tail, self._batches = split, Tail(split), batches
        self._hidden = [self._tail.whole(batch) for batch in batches]
        self._masks = [token_mask(batch) for batch in batches]

    def kl(self, call: BlockCall) -> float:
        """Mean KL per token of the model as it is now, the inputs of the call's block being known."""
        assert call.index is not None
        total, num = 0.0, 0
        for batch, states, before, mask in zip(self._batches, call.inputs, self._hidden, self._masks, strict=True):
            hidden = self._tail.from_block(call.index, states.to(before.device), batch)
            kl, tokens = sum_kl(self._split, before, hidden, mask)
            total, num = total + kl, num + tokens
        return total / num
