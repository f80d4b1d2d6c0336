"""QuantoMax: optimum-quanto's max optimizer written down by hand, and the group sizes quanto chooses."""

from __future__ import annotations

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.initializers import QuantoMax
from kdqat.models import ModelSource
from kdqat.quant import Fixed
from kdqat.spec import preset, quanto_group_size, quanto_scheme
from kdqat.student import prepare_student


@pytest.mark.parametrize(
    ("width", "group_size"), [(4096, 128), (576, 96), (1536, 128), (64, 64), (96, 96), (160, 32), (32, 32), (48, None)]
)
def test_groups_shrink_from_128_by_32_until_they_divide_the_width(width, group_size):
    assert quanto_group_size(width) == group_size
    weight = quanto_scheme(4, width).weight
    assert (weight.group_size, weight.granularity) == (group_size, "group" if group_size else "channel")


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_and_values_are_quantos(bits):
    weight = torch.randn(8, 192, generator=torch.Generator().manual_seed(0)) + 0.3
    quantizer = Fixed(quanto_scheme(bits, 192, scale_dtype="float32").weight, weight.shape)
    quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(weight)))
    base = weight.reshape(-1, 96)  # its MaxOptimizer and quantize_affine, axis 0
    low, high = base.amin(1, keepdim=True), base.amax(1, keepdim=True)
    scale, shift = (high - low) / (2**bits - 1), -low
    data = torch.round((base + shift) / scale).clamp(0, 2**bits - 1)
    assert torch.equal(quantizer.codes(weight).reshape(-1, 96).float(), data)
    torch.testing.assert_close(quantizer(weight).reshape(-1, 96), data * scale - shift)


def test_a_plan_says_quantos_groups_by_role():
    plan = Uniform(quanto_scheme(4, 64), overrides={"down": quanto_scheme(4, 128)})
    student = prepare_student(ModelSource("toy:llama"), plan, Fixed, QuantoMax())
    sizes = {layer.weight_fake_quantizer.spec.group_size for name, layer in student.layers.items() if "down" in name}
    assert sizes == {128}
    assert student.plan["model.layers.0.self_attn.q_proj"].weight.group_size == 64


def test_eight_bits_are_symmetric_by_channel_and_other_specs_are_refused_by_layer():
    assert quanto_scheme(8, 64).weight == preset("W8A16").weight
    prepare_student(ModelSource("toy:llama"), Uniform(quanto_scheme(8, 64)), Fixed, QuantoMax())
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: QuantoMax .* use quanto_scheme"):
        prepare_student(ModelSource("toy:llama"), Uniform("W4A16_G64"), Fixed, QuantoMax())
    with pytest.raises(ValueError, match="2, 4 and 8 bits, not 3"):
        quanto_scheme(3, 64)
