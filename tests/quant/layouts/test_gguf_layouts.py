"""GGUF blocks against the `gguf` package: its bytes unpack and pack again, ours are read as the student computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from kdqat.quant import MinMax
from kdqat.quant.layouts.gguf import LAYOUTS, pack_gguf, unpack_gguf
from kdqat.quant.layouts.packing import Blocks
from kdqat.spec import preset

WEIGHT = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.05
every_layout = pytest.mark.parametrize("kind", LAYOUTS)


def blocks_of(kind: str, weight: torch.Tensor = WEIGHT) -> tuple[Blocks, torch.Tensor]:
    """(what a student of this layout's preset stores, its fake-quantized weight)."""
    spec = preset(LAYOUTS[kind].preset).weight
    quantizer = MinMax(spec, weight.shape)
    stored = quantizer.stored_qparams(weight)
    minimum = stored.zero_point.squeeze(2) if spec.zero_point == "minimum" else None
    second = {name: value.squeeze(2) for name, value in quantizer.second_level(weight).items()}
    return Blocks(quantizer.codes(weight), stored.scale.squeeze(2), minimum, second), quantizer(weight)


def type_of(kind: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[kind.upper()]


@every_layout
def test_the_gguf_package_reads_the_weight_the_student_computes_with(kind):
    blocks, weight = blocks_of(kind)
    read = torch.from_numpy(dequantize(pack_gguf(kind, blocks).numpy(), type_of(kind)))
    assert torch.equal(read, weight)
    assert (weight - WEIGHT).abs().max() > 1e-5


@every_layout
def test_unpacking_gives_back_codes_scales_and_second_level(kind):
    blocks, _ = blocks_of(kind)
    again = unpack_gguf(kind, pack_gguf(kind, blocks))
    assert torch.equal(again.codes, blocks.codes) and again.codes.dtype == torch.int16
    assert torch.equal(again.scale, blocks.scale)
    assert (again.minimum is None) == (blocks.minimum is None)
    if blocks.minimum is not None:
        assert torch.equal(again.minimum, blocks.minimum)
    assert blocks.second.keys() == again.second.keys()
    assert all(torch.equal(again.second[name], blocks.second[name]) for name in blocks.second)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "mxfp4"])
def test_bytes_of_the_gguf_packages_own_quantizer_come_back_unchanged(kind):
    theirs = quantize(WEIGHT.numpy(), type_of(kind))
    blocks = unpack_gguf(kind, torch.from_numpy(theirs.copy()))
    assert np.array_equal(pack_gguf(kind, blocks).numpy(), theirs)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "mxfp4"])
def test_our_presets_choose_the_scales_that_the_gguf_package_chooses(kind):
    theirs = unpack_gguf(kind, torch.from_numpy(quantize(WEIGHT.numpy(), type_of(kind)).copy()))
    blocks, _ = blocks_of(kind)
    assert torch.equal(theirs.scale, blocks.scale)
    same = (theirs.codes == blocks.codes) if kind != "mxfp4" else (theirs.codes % 8 == blocks.codes % 8)
    assert same.float().mean() > 0.98  # it divides by the scale before that is rounded to fp16


def test_every_code_and_random_bytes_of_q4_k_survive():
    rows = torch.randint(0, 256, (4, 288), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for start in (0, 144):  # finite fp16 numbers
        rows[:, start + 1] = 0x2C
        rows[:, start + 3] = 0x28
    blocks = unpack_gguf("q4_k", rows)
    assert torch.equal(pack_gguf("q4_k", blocks), rows)
    groups = blocks.scale.unsqueeze(2) * blocks.codes.unflatten(1, (-1, 32)) + blocks.minimum.unsqueeze(2)
    assert torch.equal(groups.flatten(1), torch.from_numpy(dequantize(rows.numpy(), type_of("q4_k"))))


@every_layout
def test_a_width_that_blocks_do_not_divide_is_refused(kind):
    blocks, _ = blocks_of(kind)
    with pytest.raises(ValueError, match=r"blocks of .* do not divide width 48"):
        pack_gguf(kind, blocks._replace(codes=blocks.codes[:, :48]))
    with pytest.raises(ValueError, match="a row here 19 bytes"):
        unpack_gguf(kind, torch.zeros(2, 19, dtype=torch.uint8))


def test_numbers_that_bytes_would_not_give_back_are_refused():
    blocks, _ = blocks_of("q4_0")
    with pytest.raises(ValueError, match="no fp16 number"):
        pack_gguf("q4_0", blocks._replace(scale=blocks.scale * 1.0001))
    with pytest.raises(ValueError, match="do not lie within -8"):
        pack_gguf("q4_0", blocks._replace(codes=blocks.codes + 1))
    blocks, _ = blocks_of("mxfp4")
    with pytest.raises(ValueError, match="powers of two"):
        pack_gguf("mxfp4", blocks._replace(scale=blocks.scale * 1.5))
    blocks, _ = blocks_of("q4_k")
    with pytest.raises(ValueError, match="a minimum is no multiple"):
        pack_gguf("q4_k", blocks._replace(minimum=blocks.minimum * 1.5))
