"""torchao computes the same grids: its affine fake quantization against ours, where both define one."""

from __future__ import annotations

import pytest
import torch

from kdqat.quant import LSQ, MinMax
from kdqat.quant.functional import quantize
from kdqat.quant.grouping import from_groups, to_groups
from kdqat.types import QParams
from tests.quant.specs import GRANULARITIES, make_spec, spec_id

torchao = pytest.importorskip("torchao.quantization.quant_primitives", reason="the oracle torchao is not installed")

BOTH = [
    make_spec(bits, granularity, group_size=16, **fields)
    for bits in (8, 4, 2)
    for granularity in GRANULARITIES
    for fields in ({"scale_rule": "absmax_half"}, {"symmetric": False})
]


def oracle(weight: torch.Tensor, spec, shrink: float = 1.0) -> tuple[torch.Tensor, ...]:
    """torchao's (scale, zero point, codes, values)."""
    columns = {"tensor": 64, "channel": 64, "group": 16}[spec.granularity]
    block = (weight.shape[0] if spec.granularity == "tensor" else 1, columns)
    qmin, qmax = spec.qrange()
    kind = torchao.MappingType.SYMMETRIC if spec.symmetric else torchao.MappingType.ASYMMETRIC
    scale, zero_point = torchao.choose_qparams_affine(weight, kind, block, torch.int32, qmin, qmax)
    scale = scale * shrink
    codes = torchao.quantize_affine(weight, block, scale, zero_point, torch.int32, qmin, qmax)
    values = torchao._fake_quantize_affine(weight, block, scale, zero_point, torch.int32, qmin, qmax)
    return scale, zero_point, codes, values


@pytest.mark.parametrize("spec", BOTH, ids=spec_id)
def test_min_max_equals_torchaos_fake_quantization(spec):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)) * 0.05
    quantizer = MinMax(spec, weight.shape)
    scale, zero_point, codes, values = oracle(weight, spec)
    ours = quantizer.stored_qparams(weight)
    torch.testing.assert_close(ours.scale.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(ours.zero_point.flatten(), zero_point.flatten().float())
    # torchao multiplies by 1/scale where we divide; absmax/(qmax + 1/2) puts each group's largest weight on a tie
    steps = from_groups(to_groups(weight, spec) / ours.scale)
    settled = (steps.remainder(1) - 0.5).abs() > 1e-4
    assert settled.float().mean() > 0.9
    assert torch.equal(quantizer.codes(weight)[settled], codes[settled].to(torch.int16))
    assert (quantizer.codes(weight) - codes).abs().max() <= 1
    torch.testing.assert_close(quantizer(weight)[settled], values[settled], rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", BOTH, ids=spec_id)
def test_lsq_with_torchaos_scales_gives_torchaos_values_bit_for_bit(spec):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4)) * 0.05
    quantizer = LSQ(spec, weight.shape)
    scale, zero_point, codes, values = oracle(weight, spec, shrink=0.83)  # off the ties of absmax/(qmax + 1/2)
    shape = quantizer.scale.shape
    quantizer.load_qparams(QParams(scale.reshape(shape), zero_point.reshape(shape).float()))
    assert torch.equal(quantizer(weight), values)
    groups = to_groups(weight, spec)
    mine = quantize(groups, QParams(quantizer.scale, quantizer.zero_point), quantizer.grid, spec)
    assert torch.equal(from_groups(mine).int(), codes)
