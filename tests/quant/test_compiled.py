"""What inductor makes of a fake quantizer: the same numbers. (The contract tests compile with an eager backend.)"""

from __future__ import annotations

import shutil

import pytest
import torch

from kdqat.quant import LSQ, SEQ, FakeQuantizer, MinMax, MSEClip, QuEST
from kdqat.spec import QuantSpec, preset
from kdqat.types import QParams

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")

CASES = [
    (LSQ, "W4A16"),
    (MinMax, "W3A16_ASYM_G32"),
    (LSQ, "NVFP4"),
    (MinMax, "MXFP4"),
    (LSQ, "NF4_DOUBLE"),
    (MinMax, "GGUF_Q4_K"),
    (SEQ, "W2A16_HALF"),
    (QuEST, "QUEST_W4A16"),
    pytest.param(MSEClip, "W4A16", marks=pytest.mark.slow),  # every range tried is compiled: half a minute
]


def compiled_and_eager(quantizer: FakeQuantizer, weight: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """(values, gradient of the weight, gradients of the parameters), compiled first."""
    torch._dynamo.reset()
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (torch.compile(quantizer, fullgraph=True), quantizer):
        latent = weight.clone().requires_grad_()
        quantizer.zero_grad()
        values = function(latent)
        values.backward(upstream)
        found.append((values.detach(), latent.grad, *(p.grad for p in quantizer.parameters())))
    return found


@pytest.mark.parametrize(("method", "name"), CASES, ids=lambda case: case if isinstance(case, str) else case.__name__)
def test_compiled_values_and_scales_are_what_is_stored(method: type[FakeQuantizer], name: str) -> None:
    torch.manual_seed(0)
    weight, spec = torch.randn(16, 256), preset(name).weight
    assert spec is not None
    options = {"num_steps": 3} if method is MSEClip else {}
    quantizer = method(spec, weight.shape, **options)
    if quantizer.uses_stored_qparams:
        quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(weight)))
    with torch.no_grad():
        quantizer.scale.mul_(torch.rand_like(quantizer.scale) * 0.2 + 0.8)  # almost never on fp16's grid
    (values, *gradients), (expected, *expected_gradients) = compiled_and_eager(quantizer, weight)
    if spec.hadamard is None:
        assert torch.equal(values, expected)
    else:  # butterflies may be fused into another order of additions; a code may move with them
        assert (values - expected).abs().gt(1e-5).float().mean() < 0.001
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    assert torch.equal(quantizer.values(quantizer.codes(weight), quantizer.stored_qparams(weight)), expected)


def test_a_scale_in_fp16_is_rounded_inside_the_compiled_graph() -> None:
    """Inductor keeps fused values in fp32: left to it, the way to fp16 and back would be no rounding at all."""
    spec = QuantSpec(format="int4", scale_dtype="float16")
    quantizer = LSQ(spec, torch.Size((4, 8)))
    quantizer.load_qparams(QParams(torch.full((4, 1, 1), 0.1234567), torch.zeros(4, 1, 1)))
    values = compiled_and_eager(quantizer, torch.full((4, 8), 0.1234567))[0][0]
    assert torch.equal(values, torch.full((4, 8), torch.tensor(0.1234567).half().item()))
