"""The page "Which format?" names every preset, and the example of docs/extending/format.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kdqat import api
from kdqat.initializers import RTN, MSEGrid
from kdqat.metrics import sqnr_db
from kdqat.quant import Fixed, MinMax
from kdqat.spec import KV_PRESETS, PRESETS, QuantSpec, preset
from tests.docs.examples import snippet

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "formats.md").read_text()
ROW = re.compile(r"^\| (`[^|]*`) \| ([\d.]+) \|(.*)\|$", re.MULTILINE)


def rows() -> dict[str, tuple[float, list[str]]]:
    """Preset -> (counted bits, measured cells) of the page's table of errors."""
    found = {}
    for names, bits, cells in ROW.findall(PAGE):
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found, f"{name} has two rows"
            found[name] = (float(bits), [cell.strip() for cell in cells.split("|")])
    return found


def test_the_table_of_errors_has_a_row_for_every_preset_and_for_nothing_else():
    assert set(rows()) == set(PRESETS)


def test_presets_in_one_row_have_one_weight_spec_and_others_do_not():
    specs = [{PRESETS[name].weight for name in re.findall(r"`(\w+)`", names)} for names, _, _ in ROW.findall(PAGE)]
    assert all(len(spec) == 1 for spec in specs)
    assert len(set.union(*specs)) == len(specs)


@pytest.mark.parametrize("name", PRESETS)
def test_counted_bits_of_a_row_are_those_of_the_spec(name):
    """MiniLM's matrices: 384 x 384 four times, 1536 x 384 and 384 x 1536; what does not fit one is left out."""
    spec, bits, numel = PRESETS[name].weight, 0.0, 0
    for shape in [(384, 384)] * 4 + [(1536, 384), (384, 1536)]:
        try:
            spec.qparam_shape(shape)
        except ValueError:
            continue
        bits, numel = bits + spec.storage_bits(shape), numel + shape[0] * shape[1]
    assert rows()[name][0] == pytest.approx(bits / numel, abs=6e-4)


def test_the_page_says_of_every_family_and_cache_preset_what_it_is():
    guide = PAGE.partition("## Measured")[0]
    for name in KV_PRESETS:
        assert f"`{name}`" in guide
    families = {re.sub(r"(_ASYM)?(_G\d+)?$", "", name) for name in PRESETS} - {"GPTQ_4BIT", "AWQ_4BIT"}
    for family in families:
        assert f"`{family}`" in guide, family


def example() -> dict:
    source = re.search(
        r"^```python\n(.*?)^```", (DOCS / "extending" / "format.md").read_text(), re.DOTALL | re.MULTILINE
    )
    names: dict = {}
    exec(compile(source[1], "fitted_levels.py", "exec"), names)
    return names


def scheme() -> dict:
    return snippet("format")["model"]["plan"]["init_args"]["scheme"]


def test_the_example_finds_the_levels_of_the_recipe():
    torch.manual_seed(0)
    levels = example()["fitted_levels"](torch.randn(512, 1024), num_levels=8, group_size=64)
    assert levels == sorted(levels) and max(map(abs, levels)) == 1
    assert levels == pytest.approx(scheme()["weight"]["levels"], abs=0.02)


def test_the_examples_levels_lose_less_than_int3_by_what_the_page_says():
    torch.manual_seed(1)
    weight = torch.randn(256, 1024)
    fitted, int3 = QuantSpec(**scheme()["weight"]), preset("W3A16_G64").weight
    text = (DOCS / "extending" / "format.md").read_text()
    stated = re.search(r"([\d.]+) dB SQNR against ([\d.]+), with clipping search ([\d.]+) against\s(\d+\.\d)", text)
    measured = [sqnr_db(weight, MinMax(spec, weight.shape)(weight)).item() for spec in (fitted, int3)]
    for spec in (fitted, int3):
        quantizer = Fixed(spec, weight.shape)
        quantizer.load_qparams(MSEGrid(num_steps=40).search(weight, quantizer))
        measured.append(sqnr_db(weight, quantizer(weight)).item())
    assert measured == pytest.approx([float(x) for x in stated.groups()], abs=0.15)


def test_a_student_is_made_with_the_levels_of_the_recipe():
    student = api.quantize("toy:llama", scheme(), initializer=RTN())
    layer = student.layers["model.layers.0.mlp.up_proj"]
    assert layer.weight_fake_quantizer.spec.levels == tuple(scheme()["weight"]["levels"])
    assert layer.fake_quantized_weight()[0].unique().numel() <= 8  # 64 inputs: one group
