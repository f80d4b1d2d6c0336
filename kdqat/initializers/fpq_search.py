"""The searches of LLM-FP4 as pure functions: which minifloat and which scale give the least error of a layer's output.

A layer computes Y = X W^T. With the activations fixed at X^ the squared error of output channel k is a quadratic form,

    |X^ w^_k - X w_k|^2 = w^_k G w^_k - 2 w^_k c_k + const,   G = X^^T X^,   c_k = X^^T X w_k,

so that a candidate costs I^2 for each channel, however much text there is.
Letters: T tokens, O out, I in. Scales are in units of kdqat's grids (bias 2^(e-1)-1 inside): scale = 2^(bias - b~).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdqat.quant.formats import Grid, grid_of
from kdqat.quant.functional import fake_quantize
from kdqat.quant.grouping import from_groups, to_groups
from kdqat.quant.ranges import choose_qparams, pre_shift
from kdqat.spec import QuantSpec
from kdqat.types import QParams

Search = Literal["bias", "range"]


class Choice(NamedTuple):
    """A format with its scale, and the squared output error it was chosen for."""

    spec: QuantSpec
    scale: Tensor
    error: float


class Target(NamedTuple):
    """What a layer's output error is measured on."""

    inputs: Tensor  # X [T, I]
    outputs: Tensor  # Y [T, O], without bias


Candidates = Sequence[tuple[QuantSpec, Sequence[Tensor]]]  # formats, each with its scales


def coordinate_search(
    weight: Tensor,
    target: Target,
    weights: Candidates,
    activations: Candidates,
    weight_spec: QuantSpec,
    activation_spec: QuantSpec,
    *,
    num_rounds: int,
) -> tuple[Choice, Choice]:
    """Weight scales, activation scale, weight format, activation format, `num_rounds` times over (Alg. 1; their code).

    Scales are found for every format at each turn, so that a format is judged at its best.

    Args:
        weight_spec, activation_spec: where to start, at the full range.
    """
    start, scales = next((c for c in activations if c[0] == activation_spec), activations[0])
    seen = quantized(target.inputs, scales[0], start, _grid(start, weight))
    weight_format, activation_format = weight_spec.format, start.format
    for _ in range(num_rounds):
        found = search_weight(weight, seen, target, weights)
        chosen = next((c for c in found if c.spec.format == weight_format), found[0])
        answers = search_activation(_apply(weight, chosen), target, activations)
        answer = next(c for c in answers if c.spec.format == activation_format)
        found = search_weight(weight, _apply(target.inputs, answer), target, [(c.spec, [c.scale]) for c in found])
        chosen = min(found, key=lambda choice: choice.error)
        answers = search_activation(_apply(weight, chosen), target, [(c.spec, [c.scale]) for c in answers])
        answer = min(answers, key=lambda choice: choice.error)
        weight_format, activation_format = chosen.spec.format, answer.spec.format
        seen = _apply(target.inputs, answer)
    return chosen, answer


def search_table(table: Tensor, candidates: Candidates) -> list[Choice]:
    """For every format the best scale of each row, by the error of the table [V, H] itself."""
    return _best_scales(table, candidates, lambda trial: (trial - table).square().sum(1))


def candidate_specs(spec: QuantSpec, search_format: bool) -> list[QuantSpec]:
    """Every split of the same number of bits: all for up to 4 bits, mantissas of 2 to 6 bits for 8 (LLM-FP4's code)."""
    bits = int(spec.number.bits)
    if not search_format:
        return [spec]
    mantissas = range(2, 7) if bits == 8 else range(bits - 1)
    names = (f"e{bits - 1 - m}m{m}" for m in mantissas)
    whole = {"e4m3": "e4m3_finite", "e5m2": "e5m2_finite"}
    return [replace(spec, format=whole.get(name, name)) for name in names]


def scale_candidates(
    scale: Tensor, spec: QuantSpec, search: Search, num: int, gammas: tuple[float, float]
) -> list[Tensor]:
    """The scale itself and `num` others around it, each of its shape.

    search="bias": b~ = gamma b~_init (the paper's), where gamma multiplies a *logarithm*: for scales near 2^bias it
    does nothing. search="range": gamma multiplies the range itself, geometrically spaced, whatever its magnitude.
    """
    low, high = gammas
    if search == "range":
        ratio = (high / low) ** (1 / max(num - 1, 1))
        return [scale, *(scale * (low * ratio**i) for i in range(num))]
    bias = spec.number.bias
    exponent = bias - torch.log2(scale)  # b~
    step = (high - low) / num
    return [scale, *(torch.exp2(bias - (low + i * step) * exponent) for i in range(num))]


def quantized(x: Tensor, scale: Tensor, spec: QuantSpec, grid: Grid) -> Tensor:
    """x [rows, I] on the grid of `spec`."""
    qparams = QParams(scale, torch.zeros_like(scale))
    return from_groups(fake_quantize(to_groups(x, spec), qparams, grid, spec))


def search_weight(weight: Tensor, inputs: Tensor, target: Target, candidates: Candidates) -> list[Choice]:
    """For every format the best scale of each output channel, given the quantized `inputs` X^ [T, I].

    Returns:
        One choice for each format, in order; scales [O, 1, 1] (or [1]).
    """
    gram, cross = inputs.T @ inputs, target.outputs.T @ inputs  # G [I, I], c [O, I]
    constant = target.outputs.square().sum(0)

    def error(trial: Tensor) -> Tensor:  # [O]
        return (trial @ gram * trial).sum(1) - 2 * (trial * cross).sum(1) + constant

    return _best_scales(weight, candidates, error)


def search_activation(weight: Tensor, target: Target, candidates: Candidates) -> list[Choice]:
    """For every format the best scale of the activations, given the quantized `weight` W^ [O, I]."""
    square = weight.T @ weight if weight.shape[1] < weight.shape[0] else None
    back = target.outputs @ weight  # [T, I]
    constant = target.outputs.square().sum().double()  # in fp32 small differences of errors would be rounded away

    def error(trial: Tensor) -> Tensor:  # 0-D
        energy = (trial @ square * trial).sum() if square is not None else (trial @ weight.T).square().sum()
        return (energy - 2 * (trial * back).sum()).double() + constant

    return _best_scales(target.inputs, candidates, error)


def _best_scales(x: Tensor, candidates: Candidates, error_of: Callable[[Tensor], Tensor]) -> list[Choice]:
    """For every format the scale under which x has the least error, channel by channel; the first of equals.

    Nothing waits for the device but the sum at the end of a format.

    Args:
        error_of: fake-quantized x -> its error, one number a row [O] or one for all (0-D).
    """
    choices = []
    for spec, scales in candidates:
        grid, best_scale, best = _grid(spec, x), scales[0], None
        for scale in scales:
            error = error_of(quantized(x, scale, spec, grid))
            error = error.reshape(-1, 1, 1) if spec.granularity == "channel" else error.sum().reshape(1)
            better = error < best if best is not None else torch.ones_like(error, dtype=torch.bool)
            best_scale = torch.where(better, scale, best_scale)
            best = torch.where(better, error, best) if best is not None else error
        assert best is not None
        choices.append(Choice(spec, best_scale, float(best.sum())))
    return choices


def weight_candidates(
    weight: Tensor, specs: Sequence[QuantSpec], search: Search, num: int, gammas: tuple[float, float]
) -> list[tuple[QuantSpec, list[Tensor]]]:
    """Each format with scales around the one of the full range."""
    full = [(spec, choose_qparams(to_groups(weight, spec), _grid(spec, weight), spec).scale) for spec in specs]
    return [(spec, scale_candidates(scale, spec, search, num, gammas)) for spec, scale in full]


def activation_candidates(
    inputs: Tensor, specs: Sequence[QuantSpec], search: Search, num: int, gammas: tuple[float, float]
) -> list[tuple[QuantSpec, list[Tensor]]]:
    """As `weight_candidates`; with pre-shift only rho~, the bias of the whole tensor, is searched (LLM-FP4, eq. 15)."""
    found = []
    for spec in specs:
        groups, grid = to_groups(inputs, spec), _grid(spec, inputs)
        if spec.granularity != "feature":
            scale = choose_qparams(groups, grid, spec).scale
            found.append((spec, scale_candidates(scale, spec, search, num, gammas)))
            continue
        own = groups.abs().amax((0, 1), keepdim=True) / grid.high  # [1, 1, I], each feature's b~ stays at min-max
        largest = own.amax().clamp(min=torch.finfo(torch.float32).tiny)
        bits = spec.number.exponent_bits
        shifted = [rho * pre_shift(own, rho, bits) for rho in scale_candidates(largest, spec, search, num, gammas)]
        found.append((spec, shifted))
    return found


def _apply(x: Tensor, choice: Choice) -> Tensor:
    return quantized(x, choice.scale, choice.spec, _grid(choice.spec, x))


def _grid(spec: QuantSpec, like: Tensor) -> Grid:
    with torch.device(like.device):
        return grid_of(spec)
