"""The codes of llm-compressor's GPTQ, and ours on the same weight, Hessian and scales; see make_gptq_vectors.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdqat.initializers.gptq_solve import solve
from kdqat.initializers.rewrite import write_values
from kdqat.quant import FakeQuantLinear, Fixed
from kdqat.spec import LayerScheme, QuantSpec

VECTORS = load_file(Path(__file__).with_name("gptq_vectors.safetensors"))
CASES = sorted(name.removesuffix(".codes") for name in VECTORS if name.endswith(".codes"))


def spec_of(name: str) -> QuantSpec:
    bits, grouping, symmetry = name.split("_")[:3]
    shared = (
        {"granularity": "channel"}
        if grouping == "channel"
        else {"granularity": "group", "group_size": int(grouping[1:])}
    )
    zero = {"scale_rule": "absmax_half"} if symmetry == "sym" else {"symmetric": False, "zero_point": "integer"}
    return QuantSpec(format=f"int{bits[1:]}", **shared, **zero)


@pytest.mark.parametrize("block_size", [128, 48])
@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_of_llm_compressor(name, block_size):
    spec, weight = spec_of(name), VECTORS["weight"]
    layer = FakeQuantLinear.wrap(nn.Linear(weight.shape[1], len(weight)), LayerScheme(weight=spec), Fixed)
    quantizer = layer.weight_fake_quantizer
    found = solve(
        weight,
        VECTORS["hessian"],
        quantizer,
        act_order=name.endswith("order"),
        static_groups=True,
        block_size=block_size,
    )
    torch.testing.assert_close(found.qparams.scale.squeeze(2), VECTORS[f"{name}.scale"], rtol=1e-6, atol=0)
    write_values(layer, found.values, found.qparams)
    codes, theirs = quantizer.codes(layer.weight), VECTORS[f"{name}.codes"]
    if not spec.symmetric:  # theirs run from -2^(b-1), ours from 0
        theirs = theirs + 2 ** (int(spec.bits) - 1)
    assert torch.equal(codes, theirs)
    nearest = Fixed(spec, weight.shape)
    nearest.load_qparams(found.qparams)
    assert (nearest.codes(weight) != theirs).float().mean() > 0.1  # it is not rounding to nearest that agrees
