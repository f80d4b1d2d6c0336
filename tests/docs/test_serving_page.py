"""The page "From a run to vLLM, llama.cpp, transformers" says what the exporters and the gate say."""

from __future__ import annotations

import re
from pathlib import Path

from kdqat.cli.parser import parse_recipe
from kdqat.exporters.parity_logits import TOLERANCES
from kdqat.exporters.words import format_words
from kdqat.initializers import StoredScales
from kdqat.student import GGUFScales
from tests.benchmarks.export_table import table

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()


def test_the_table_of_formats_is_what_the_exporters_refuse_and_hold():
    written = re.search(r"<!-- made by .*? -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert written is not None and written[1] == table(), "python tests/benchmarks/export_table.py writes it anew"


def test_the_tolerances_are_those_of_the_gate():
    for dtype, tolerance in TOLERANCES.items():
        numbers = (tolerance.max_difference, tolerance.kl_mean, tolerance.kl_p95)
        assert f"| {dtype} | {' | '.join(map(str, numbers))} |" in PAGE


def test_the_words_and_classes_of_the_page_are_formats_and_all_formats_are_on_it():
    words = set(format_words())
    named = set(re.findall(r"--format ([\w:-]+)", PAGE))
    assert named and named <= words
    assert all(f"`{word}`" in PAGE for word in words)


def test_the_imports_of_the_page_are_recipes(tmp_path):
    sections = [block for block in re.findall(r"```yaml\n(model:.*?)```", PAGE, re.DOTALL)]
    assert len(sections) == 2
    for section in sections:
        (tmp_path / "recipe.yaml").write_text(section)
        model = parse_recipe(tmp_path / "recipe.yaml").model
        assert type(model.initializer) in (StoredScales, GGUFScales)


def test_the_export_section_of_the_page_is_one(tmp_path):
    (section,) = re.findall(r"```yaml\n(export:.*?)```", PAGE, re.DOTALL)
    plan = "{class_path: Uniform, init_args: {scheme: GGUF_Q4_0}}"
    model = f'model: {{student: {{path: "toy:llama"}}, plan: {plan}, quantizer: LSQ}}'
    (tmp_path / "recipe.yaml").write_text(f"{model}\n{section}")
    names = [exporter.name for exporter in parse_recipe(tmp_path / "recipe.yaml").exporters]
    assert names == ["compressed-tensors", "gguf_q4_0"]
