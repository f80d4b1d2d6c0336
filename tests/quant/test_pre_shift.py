"""LLM-FP4's pre-shifted exponent bias: the paper's numbers, and the fold into the weight, which is exact."""

from __future__ import annotations

import pytest
import torch

from kdqat.quant.formats import grid_of
from kdqat.quant.functional import dequantize, quantize
from kdqat.quant.ranges import choose_qparams, fold_pre_shift, pre_shift, pre_shifted_scale
from kdqat.spec import QuantSpec
from kdqat.types import QParams


def shifted(name: str) -> QuantSpec:
    return QuantSpec(format=name, granularity="feature", scale_rule="pre_shift")


def test_the_golden_vector_of_e2m1():
    spec = shifted("e2m1")
    maxima = torch.tensor([10, 3, 0.8, 0.1])
    own = (maxima / 6).reshape(1, 1, 4)
    bias = -torch.log2(own / 2**spec.number.bias)  # b~ of each channel, eq. 14
    torch.testing.assert_close(bias.flatten(), torch.tensor([0.263034, 2.0, 3.906891, 6.906891]), rtol=0, atol=1e-5)
    shift = pre_shift(own, own.max(), spec.number.exponent_bits)
    assert (-torch.log2(shift)).flatten().tolist() == [0, 2, 3, 3]  # 3.64 rounds to 4 and, as 6.64, is cut to 2^e - 1
    tokens = torch.stack((maxima, -maxima / 2)).unsqueeze(1)  # [2, 1, 4]
    scale = choose_qparams(tokens, grid_of(spec), spec).scale
    assert scale.shape == (1, 1, 4)
    rho = (2 * 2.0 ** -torch.tensor(0.263034)).item()  # 2^bias 2^-rho~ is the scale of the largest channel
    torch.testing.assert_close(scale.flatten(), rho / torch.tensor([1.0, 4, 8, 8]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "largest"), [("e1m2", 1), ("e2m1", 3), ("e3m0", 7), ("e4m3_finite", 15)])
def test_shifts_are_whole_and_lie_within_what_the_exponent_holds(name, largest):
    own = torch.exp2(-torch.arange(0, 30, 0.25)).reshape(1, 1, -1)
    shift = pre_shift(own, own.max(), shifted(name).number.exponent_bits)
    exponents = -torch.log2(shift.flatten())
    assert torch.equal(exponents, exponents.round())
    assert exponents.min() == 0 and exponents.max() == largest
    assert torch.equal(exponents, torch.arange(0, 30, 0.25).round().clamp(max=largest))


@pytest.mark.parametrize("name", ["e1m2", "e2m1", "e3m0", "e2m2", "e4m3_finite"])
@pytest.mark.parametrize("seed", range(3))
def test_the_folded_matmul_equals_the_unfolded_one_in_fp64(name, seed):
    torch.manual_seed(seed)
    spec, weight_spec = shifted(name), QuantSpec(format="e2m1")
    grid, weight_grid = grid_of(spec), grid_of(weight_spec)
    features = torch.exp2(torch.randn(48) * 3)  # orders of magnitude apart
    tokens = (torch.randn(20, 48) * features).unsqueeze(1)
    weight = torch.randn(16, 1, 48)
    own = choose_qparams(tokens, grid, spec)
    levels = quantize(tokens, own, grid, spec)
    weight_qparams = choose_qparams(weight, weight_grid, weight_spec)
    weight_values = dequantize(quantize(weight, weight_qparams, weight_grid, weight_spec), weight_qparams, weight_spec)

    unfolded = dequantize(levels, own, spec).squeeze(1).double() @ weight_values.squeeze(1).double().t()
    one = own.scale.max().reshape(1)
    tensor_values = dequantize(levels, QParams(one, torch.zeros(1)), spec).squeeze(1)
    folded = fold_pre_shift(weight_values.squeeze(1).double(), own.scale / one)
    assert torch.equal(tensor_values.double() @ folded.t(), unfolded)
    assert not torch.equal(tensor_values.double() @ weight_values.squeeze(1).double().t(), unfolded)


def test_features_of_zeros_and_a_tensor_of_zeros_stay_finite():
    spec, grid = shifted("e2m1"), grid_of(shifted("e2m1"))
    tokens = torch.zeros(3, 1, 4)
    assert choose_qparams(tokens, grid, spec).scale.isfinite().all()
    tokens[:, :, 0] = 6
    scale = choose_qparams(tokens, grid, spec).scale
    assert scale.flatten().tolist() == [1, 0.125, 0.125, 0.125]
    assert torch.equal(pre_shifted_scale(torch.tensor([[[1.0, 0.0]]]), 2), torch.tensor([[[1.0, 0.125]]]))
