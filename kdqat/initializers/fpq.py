"""FPQ of LLM-FP4 (https://arxiv.org/abs/2310.16836): formats and scales of minifloats, searched for least output error.

For each layer alone, on full-precision inputs ("parallel" calibration): three rounds of coordinate search over the
weight's scales (one a channel), the activation's scale, the weight's format, the activation's format, in the order of
the authors' code. Pre-shifted activations (scale_rule="pre_shift") carry a power of two for each feature, which moves
into the weight and costs nothing in a matmul; only their common bias is searched.

Two things are not the paper's. `search="range"`, the default, multiplies the range and not its logarithm (see
`fpq_search.scale_candidates`). And encoders are searched with the output error too; the paper weighs it by a Hessian.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdqat.calibrate import layer_inputs
from kdqat.initializers.base import Initializer
from kdqat.initializers.fpq_search import (
    Choice,
    Search,
    Target,
    activation_candidates,
    candidate_specs,
    coordinate_search,
    search_table,
    search_weight,
    weight_candidates,
)
from kdqat.quant import FakeQuantizer, QuantizedLayer
from kdqat.quant.formats import float_step, nearest
from kdqat.quant.functional import quantize
from kdqat.quant.grouping import to_groups
from kdqat.quant.ranges import fold_pre_shift
from kdqat.types import BlockView, QParams

Mode = Literal["ideal", "range_checked"]


class FPQ(Initializer):
    """Joint search of format and scale for minifloat weights and static minifloat activations.

    Args:
        num_rounds: of the coordinate search.
        num_candidates: scales tried beside the full range.
        search: "range" multiplies ranges by gamma, "bias" exponent biases, as the paper does.
        gammas: from, to; None: (0.3, 1.2) for "range", (0.01, 1.2) for "bias".
        search_format: also choose how the bits are split; the plan then says what was chosen.
        mode: of pre-shift. "ideal" counts on exponents without limit where the shift moves into the weight;
            "range_checked" rounds the shifted weight to its own format once more, as real 4-bit weights must be.
        max_tokens: inputs sampled a layer.

    Raises:
        ValueError: for numbers that make no search.
    """

    needs_calibration: ClassVar[bool] = True

    def __init__(
        self,
        *,
        num_rounds: int = 3,
        num_candidates: int = 100,
        search: Search = "range",
        gammas: tuple[float, float] | None = None,
        search_format: bool = True,
        mode: Mode = "ideal",
        max_tokens: int = 4096,
    ) -> None:
        if min(num_rounds, num_candidates, max_tokens) < 1:
            raise ValueError("FPQ needs num_rounds, num_candidates and max_tokens of at least 1")
        if search not in ("range", "bias") or mode not in ("ideal", "range_checked"):
            raise ValueError("FPQ: search is range or bias, mode is ideal or range_checked")
        usual = (0.3, 1.2) if search == "range" else (0.01, 1.2)
        self.gammas: tuple[float, float] = usual if gammas is None else (gammas[0], gammas[1])
        if not 0 < self.gammas[0] < self.gammas[1]:
            raise ValueError(f"FPQ: gammas are two numbers, 0 < from < to, not {gammas}")
        self.num_rounds, self.num_candidates, self.search = num_rounds, num_candidates, search
        self.search_format, self.mode, self.max_tokens = search_format, mode, max_tokens
        self.rewrites_weights = mode == "range_checked"

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        for name, layer in block.layers.items():
            try:
                self._initialize(name, layer, block)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None

    def _initialize(self, name: str, layer: QuantizedLayer, block: BlockView) -> None:
        quantizer = layer.weight_fake_quantizer
        if quantizer is None:
            return
        _require_minifloat("weight", quantizer, ("tensor", "channel"))
        weight = layer.as_matrix(layer.weight).float()
        given = (self.search, self.num_candidates, self.gammas)
        weights = weight_candidates(weight, candidate_specs(quantizer.spec, self.search_format), *given)
        if isinstance(layer, nn.Embedding):  # no inputs: the table itself, one format for it, a scale for each row
            _take(quantizer, min(search_table(weight, weights), key=lambda choice: choice.error))
            return
        inputs = layer_inputs(block.call, [name], max_tokens=self.max_tokens)[name]
        target = Target(inputs, inputs @ weight.T)
        activation = layer.activation_fake_quantizer
        if activation is None or activation.spec.dynamic:  # only the weight moves, so one round is all
            seen = inputs if activation is None else activation(inputs)
            _take(quantizer, min(search_weight(weight, seen, target, weights), key=lambda choice: choice.error))
            return
        _require_minifloat("activation", activation, ("tensor", "feature"))
        activations = activation_candidates(inputs, candidate_specs(activation.spec, self.search_format), *given)
        chosen = coordinate_search(
            weight, target, weights, activations, quantizer.spec, activation.spec, num_rounds=self.num_rounds
        )
        _take(quantizer, chosen[0])
        _take(activation, chosen[1])
        if activation.spec.granularity == "feature" and self.mode == "range_checked":
            shifts = activation.scale / activation.scale.amax()  # 2^-b_ori [1, 1, I], exactly
            values = range_checked(weight, quantizer, shifts)
            layer.weight.copy_(layer.from_matrix(values))


def range_checked(weight: Tensor, quantizer: FakeQuantizer, shifts: Tensor) -> Tensor:
    """The weight [O, I] whose shifted codes exist: each row of codes times 2^-b_ori is rounded to the format once more.

    The result lies on the unshifted grid, so that fake quantization leaves it as it is.
    """
    qparams, grid, shift = quantizer.stored_qparams(weight), quantizer.grid, shifts.reshape(-1)
    levels = quantize(quantizer.groups(weight), qparams, grid, quantizer.spec).reshape(weight.shape)
    shifted = nearest(fold_pre_shift(levels, shift), grid)
    over = shifted.abs() > grid.high * shift  # rounded up past what the unshifted format reaches
    shifted = torch.where(over, shifted - torch.copysign(float_step(shifted, grid), shifted), shifted)
    return (qparams.scale * to_groups(shifted / shift, quantizer.spec)).reshape(weight.shape)


def _require_minifloat(key: str, quantizer: FakeQuantizer, granularities: tuple[str, ...]) -> None:
    spec = quantizer.spec
    if spec.number.kind != "float" or spec.granularity not in granularities:
        allowed = " or ".join(granularities)
        raise ValueError(
            f"{key}: FPQ searches minifloats by {allowed}, not {spec.format} by {spec.granularity}; "
            "use FP4_W4A4_PRE_SHIFT or another FP4 preset"
        )
    if not quantizer.uses_stored_qparams:
        raise ValueError(f"{key}: {type(quantizer).__name__} takes no scales; use LSQ or Fixed with FPQ")


def _take(quantizer: FakeQuantizer, choice: Choice) -> None:
    if choice.spec.format != quantizer.spec.format:
        quantizer.set_format(choice.spec.format)
    quantizer.load_qparams(QParams(choice.scale, torch.zeros_like(choice.scale)))
