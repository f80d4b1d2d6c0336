"""The FP4 recipes on toys: every row of the paper's table that their comments list can be made and measured."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.cli.fork_server import ROOT, run

FP4 = ROOT / "recipes" / "fp4"
TOYS = {"smollm2_w4a4.yaml": "toy:llama", "minilm_w4a4.yaml": "toy:bert_encoder"}
SMALL = ["--model.calibration.text", "kdqat:prose", "--model.calibration.num_rows", "2"]
SMALL += ["--model.calibration.seq_len", "32", "--model.initializer.num_rounds", "1"]
SMALL += ["--model.initializer.num_candidates", "2", "--model.initializer.max_tokens", "32"]
INT4 = "{weight: {format: int4}, activation: {format: int4, granularity: tensor}}"
ROWS = {
    "pre-shift": [],
    "fpq": ["--model.plan.scheme", "FP4_W4A4"],
    "min-max FP4": ["--model.plan.scheme", "FP4_W4A4", "--model.initializer", "RTN"],
    "min-max INT4": ["--model.initializer", "RTN", "--model.plan.scheme", INT4],
    "W4A8": ["--model.plan.scheme", "FP4_W4A8"],
    "W8A8": ["--model.plan.scheme", "FP8_W8A8"],
    "range-checked": ["--model.initializer.mode", "range_checked"],
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", TOYS)
def test_every_row_of_the_table_is_quantized(name: str, row: str, tmp_path: Path) -> None:
    """With the toy's 64 features; the recipe says nothing of a width."""
    overrides = ["--trainer.default_root_dir", "run", "--model.student.path", TOYS[name], *SMALL, *ROWS[row]]
    run(tmp_path, "quantize", str(FP4 / name), *overrides)
    plan = json.loads((tmp_path / "run" / "prepared" / "quant_plan.json").read_text())
    bits = {"W4A8": {4, 8}, "W8A8": {8}}.get(row, {4})
    assert {width(spec["format"]) for scheme in plan["schemes"].values() for spec in scheme.values() if spec} == bits


def width(number: str) -> int:
    """Bits of a code of int4, e2m1, e4m3_finite ..."""
    if number.startswith("int"):
        return int(number[3:])
    return 1 + sum(int(digit) for digit in re.findall(r"[em](\d)", number))


@pytest.mark.parametrize("name", TOYS)
def test_the_comment_names_the_overrides_that_are_tested_here(name: str) -> None:
    comment = " ".join(line.lstrip("# ") for line in (FP4 / name).read_text().splitlines() if line.startswith("#"))
    for overrides in ROWS.values():
        for option, value in zip(overrides[::2], overrides[1::2], strict=True):
            assert f"{option} {shlex.quote(value)}" in comment


def test_eval_measures_a_prepared_language_model_against_its_source(tmp_path: Path) -> None:
    toy = ["--trainer.default_root_dir", "run", "--model.student.path", "toy:llama", *SMALL]
    run(tmp_path, "quantize", str(FP4 / "smollm2_w4a4.yaml"), *toy)
    run(tmp_path, "eval", "run")
    models = json.loads((tmp_path / "run" / "eval.json").read_text())["models"]
    assert set(models["student"]) == {"python_docs:heldout", "kdqat:prose"}
    assert all(0 < numbers["kl_mean"] < 1 for numbers in models["student"].values())
