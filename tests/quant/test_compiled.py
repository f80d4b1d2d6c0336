"""What inductor makes of a fake quantizer: the same numbers. (The contract tests compile with an eager backend.)"""

from __future__ import annotations

import shutil

import pytest
import torch

from kdqat.quant import LSQ, FakeQuantizer, MinMax
from kdqat.spec import preset


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("method", [LSQ, MinMax])
@pytest.mark.parametrize("name", ["W4A16", "W3A16_ASYM_G32"])
def test_compiled_scales_are_rounded_to_what_is_stored(method: type[FakeQuantizer], name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    spec = preset(name).weight
    assert spec is not None
    quantizer = method(spec, weight.shape)
    with torch.no_grad():
        quantizer.scale.uniform_(0.1, 0.3)  # almost never on fp16's grid
    eager = quantizer(weight)
    compiled = torch.compile(quantizer, fullgraph=True)(weight)
    # a weight on a threshold may take the neighbouring code; a scale left in fp32 moves nearly all values
    assert (eager != compiled).float().mean() < 0.001
    codes, qparams = quantizer.codes(weight).float(), quantizer.stored_qparams(weight)
    stored = qparams.scale.detach().half().float()
    assert torch.equal(stored, qparams.scale)
    groups = codes.reshape(48, -1, spec.group_size or 64)
    assert (compiled != (stored * (groups - qparams.zero_point)).reshape(48, 64)).float().mean() < 0.001
