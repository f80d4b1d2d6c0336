"""MSEGrid: never a larger weight error than RTN, on the scales that are stored; its best point is the grid's best."""

from __future__ import annotations

import pytest
import torch

from kdqat.initializers import RTN, MSEGrid
from kdqat.quant import Fixed, MinMax
from kdqat.quant.grouping import to_groups
from kdqat.quant.ranges import choose_qparams
from kdqat.spec import PRESETS
from kdqat.types import BlockView
from tests.contracts.test_initializers import make_block, weight_error
from tests.quant.specs import GRANULARITIES, fixed, make_spec, spec_id

GRIDS = [
    make_spec(bits, granularity, scale_dtype=dtype, **fields)
    for bits in (2, 3, 4, 8)
    for granularity in GRANULARITIES
    for dtype in ("float32", "float16")
    for fields in ({}, {"scale_rule": "absmax_half"}, {"scale_rule": "signed_max"}, {"symmetric": False})
]


@pytest.mark.parametrize("spec", GRIDS, ids=spec_id)
def test_no_group_has_a_larger_weight_error_than_with_rtn(spec):
    grid, rtn = make_block(spec), make_block(spec)
    MSEGrid(num_steps=20).initialize(grid)
    RTN().initialize(rtn)
    for name in ("block.a", "block.b"):
        ours, theirs = (block.layers[name] for block in (grid, rtn))
        errors = []
        for layer in (ours, theirs):
            square = to_groups((layer.fake_quantized_weight() - layer.weight).detach().square(), spec)
            errors.append(square.sum() if spec.granularity == "tensor" else square.sum(-1))
        assert (errors[0] <= errors[1] * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_loses_by_the_search(name):
    """Nested scales share a second level, so that a single group may get worse; the tensor does not."""
    spec, weight = PRESETS[name].weight, torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    quantizer = Fixed(spec, weight.shape)
    quantizer.load_qparams(MSEGrid(num_steps=10).search(weight, quantizer))
    rtn = (MinMax(spec, weight.shape)(weight) - weight).square().sum()
    assert (quantizer(weight) - weight).square().sum() <= rtn * (1 + 1e-6)


def test_at_low_bits_clipping_is_found_to_pay():
    spec = make_spec(2, "group")
    grid, rtn = make_block(spec), make_block(spec)
    MSEGrid().initialize(grid)
    RTN().initialize(rtn)
    assert weight_error(grid.layers["block.a"]) < 0.8 * weight_error(rtn.layers["block.a"])


def test_the_scale_it_finds_is_the_best_of_all_points_by_hand():
    spec, weight = make_spec(3), torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    quantizer = Fixed(spec, weight.shape)
    found = MSEGrid(num_steps=11, smallest=0.5).search(weight, quantizer).scale.item()
    tried = {}
    for step in range(11):
        scale = weight.abs().max().item() * (1 - 0.05 * step) / 3
        tried[scale] = (fixed(spec, weight.shape, scale)(weight) - weight).square().sum().item()
    assert found == pytest.approx(min(tried, key=tried.get), rel=1e-5)
    assert found < max(tried)  # not the full range


def test_the_error_counts_the_scale_as_it_is_stored():
    """In bf16 the scale moves by up to 0.4 %: the best point is the one that is best after that, not before."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    plain, stored = make_spec(8), make_spec(8, scale_dtype="bfloat16")
    quantizer = Fixed(stored, weight.shape)
    errors = []
    for spec in (stored, plain):
        quantizer.load_qparams(MSEGrid().search(weight, Fixed(spec, weight.shape)))
        errors.append((quantizer(weight) - weight).square().sum(-1))
    assert (errors[0] <= errors[1]).all() and (errors[0] < errors[1]).any()


def test_a_larger_norm_clips_less():
    spec, weight = make_spec(3), torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    quantizer = Fixed(spec, weight.shape)
    means = [MSEGrid(norm=norm).search(weight, quantizer).scale.mean() for norm in (1.0, 2.0, 6.0)]
    assert means[0] < means[1] < means[2]


def test_rtn_sets_exactly_the_ranges_of_the_weights():
    for spec in (make_spec(4), make_spec(4, "group", symmetric=False), make_spec(4, "tensor", scale_rule="signed_max")):
        block = make_block(spec)
        RTN().initialize(block)
        layer = block.layers["block.a"]
        quantizer = layer.weight_fake_quantizer
        expected = choose_qparams(to_groups(layer.weight.detach(), spec), quantizer.grid, spec)
        assert torch.equal(quantizer.scale, expected.scale) and torch.equal(quantizer.zero_point, expected.zero_point)


@pytest.mark.parametrize("arguments", [{"num_steps": 1}, {"smallest": 0.0}, {"smallest": 1.0}, {"norm": 0.0}])
def test_a_grid_that_is_none_is_refused(arguments):
    with pytest.raises(ValueError, match="MSEGrid needs num_steps >= 2, 0 < smallest < 1 and norm > 0"):
        MSEGrid(**arguments)


def test_a_block_without_quantized_layers_is_left_alone():
    MSEGrid().initialize(BlockView(None, {}))
