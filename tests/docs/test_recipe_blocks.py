"""The YAML blocks of the pages on activations, FP4 and PTQ are recipes: they parse, and a toy is prepared by each."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kdqat import api
from kdqat.cli.parser import parse_recipe
from kdqat.quant import Fixed, LSQPlus, MinMax, kv_caches
from kdqat.student import Student
from tests.cli.recipes import BASE
from tests.docs.examples import SNIPPET, laid_over

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("activations", "fp4", "ptq")


def blocks(page: str) -> dict[str, dict[str, Any]]:
    """The page's blocks by the heading they stand under; a second one gets " 2" behind it."""
    found: dict[str, dict[str, Any]] = {}
    for section in re.split(r"^## ", (DOCS / f"{page}.md").read_text(), flags=re.MULTILINE)[1:]:
        for number, text in enumerate(SNIPPET.findall(section), start=1):
            found[section.partition("\n")[0] + (f" {number}" if number > 1 else "")] = yaml.safe_load(text)
    return found


BLOCKS = [(page, heading) for page in PAGES for heading in blocks(page)]


def prepared(page: str, heading: str, folder: Path) -> Student:
    content = laid_over(copy.deepcopy(BASE), blocks(page)[heading])
    content["model"]["student"] = {"path": content["model"]["student"]["path"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return parse_recipe(folder / "recipe.yaml").model.prepare()


def layer(student: Student, ending: str) -> Any:
    return next(layer for name, layer in student.layers.items() if name.endswith(ending))


@pytest.mark.parametrize(("page", "heading"), BLOCKS)
def test_every_block_is_a_recipe_that_prepares_a_toy(page: str, heading: str, tmp_path: Path) -> None:
    student = prepared(page, heading, tmp_path)
    for layer in student.layers.values():
        if layer.weight_fake_quantizer is not None:
            assert layer.fake_quantized_weight().isfinite().all()


def test_the_static_example_trains_ranges_that_calibration_set(tmp_path: Path) -> None:
    quantizer = layer(
        prepared("activations", "Static and dynamic ranges", tmp_path), "up_proj"
    ).activation_fake_quantizer
    assert isinstance(quantizer, LSQPlus) and not quantizer.learn_zero_point
    assert quantizer.scale.requires_grad and quantizer.scale.item() != 1 and not quantizer.spec.dynamic


def test_the_deployed_activations_are_off_while_training_only(tmp_path: Path) -> None:
    linear = layer(prepared("activations", "Train W4A16, deploy W4A4", tmp_path), "up_proj")
    x = torch.randn(2, 64)
    assert isinstance(linear.activation_fake_quantizer, MinMax)
    assert torch.equal(linear.train().quantized_input(x), x)
    assert not torch.equal(linear.eval().quantized_input(x), x)


def test_the_examples_of_the_cache_quantize_it_after_and_before_rope(tmp_path: Path) -> None:
    after, before = (prepared("activations", heading, tmp_path) for heading in ("KV cache", "KV cache 2"))
    caches = kv_caches(after.model)
    assert len(caches) == 2 and all(cache.key.scale.shape == (1, 1, 32) for cache in caches.values())  # 2 heads of 16
    assert all(cache.key.scale.unique().numel() > 1 for cache in caches.values())  # calibrated
    assert layer(after, "k_proj").output_fake_quantizer is None
    assert not kv_caches(before.model) and before.plan.kv_cache is None
    assert layer(before, "k_proj").output_fake_quantizer.spec.format == "int4"
    assert layer(before, "q_proj").output_fake_quantizer is None


def test_the_tied_embeddings_of_the_example_share_one_quantizer(tmp_path: Path) -> None:
    student = prepared("activations", "Embeddings and lm_head", tmp_path)
    embedding, head = layer(student, "embed_tokens"), layer(student, "lm_head")
    assert embedding.weight is head.weight and embedding.weight_fake_quantizer is head.weight_fake_quantizer
    assert head.weight_fake_quantizer.spec.bits == 8 and layer(student, "up_proj").weight_fake_quantizer.spec.bits == 4


def test_the_routers_of_the_example_stay_and_its_experts_do_not(tmp_path: Path) -> None:
    student = prepared("activations", "Mixture of experts", tmp_path)
    assert {name.rpartition(".")[2] for name in student.coverage.ignored} == {"gate", "lm_head"}
    assert layer(student, "experts.gate_up_proj").activation_fake_quantizer is None
    assert layer(student, "experts.down_proj").activation_fake_quantizer.spec.dynamic


def test_a_glob_passes_routers_by_and_an_override_that_names_one_is_refused_as_the_page_says() -> None:
    assert "passes routers by" in (DOCS / "activations.md").read_text()
    student = api.quantize("toy:mixtral", api.Uniform("W4A16_G32", overrides={"*.layers.0.*": "W8A16"}))
    assert {name.rpartition(".")[2] for name in student.coverage.ignored} == {"gate", "lm_head"}
    with pytest.raises(ValueError, match=r"mlp\.gate: it is a MixtralTopKRouter.*put it into `ignore`"):
        api.quantize("toy:mixtral", api.Uniform("W4A16_G32", overrides={"router": "W8A16"}))


def test_the_fp4_example_lets_a_search_choose_and_keeps_what_it_found(tmp_path: Path) -> None:
    (heading,) = blocks("fp4")
    student = prepared("fp4", heading, tmp_path)
    quantizers = [
        layer.activation_fake_quantizer for layer in student.layers.values() if layer.activation_fake_quantizer
    ]
    assert all(isinstance(quantizer, Fixed) and quantizer.spec.bits == 4 for quantizer in quantizers)
    assert len({quantizer.spec.format for quantizer in quantizers}) > 1
    planned = {name: scheme.activation.format for name, scheme in student.plan.items() if scheme.activation}
    assert planned == {name: student.layers[name].activation_fake_quantizer.spec.format for name in planned}
