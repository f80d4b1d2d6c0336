"""The layer-wise recipes: short, run on a toy where its width allows, and with the bits that their heads promise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from kdqat.allocate import ByImportance
from kdqat.cli.parser import parse_recipe
from kdqat.spec import QuantPlan, Scores
from kdqat.types import LayerRef
from tests.cli.fork_server import ROOT, run

FOLDER = ROOT / "recipes" / "layerwise"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if "schedule" not in path.name)  # its plan has no scores


@pytest.mark.parametrize("name", FILES)
def test_it_is_short_opens_with_its_commands_and_reads_the_scores_it_writes(name: str) -> None:
    text = (FOLDER / name).read_text()
    head = text[: text.index("seed_everything")]
    assert len(text.splitlines()) <= 40
    assert f"kdqat score recipes/layerwise/{name}" in head and re.search(r"kdqat (fit|quantize) recipes", head)
    content = yaml.safe_load(text)
    assert content["model"]["plan"]["init_args"]["scores"] == f"{content['trainer']['default_root_dir']}/scores.json"
    if "gpu" not in text:
        assert parse_recipe(FOLDER / name).scoring is not None


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("smollm2")])
def test_a_toy_is_scored_quantized_and_measured(name: str, tmp_path: Path) -> None:
    small = ["--trainer.default_root_dir", "run", "--model.student.path", "toy:llama", "--trainer.accelerator", "cpu"]
    small += ["--model.plan.scores", "run/scores.json", "--score.calibration.text", "kdqat:prose"]
    small += ["--score.calibration.seq_len", "32", "--score.calibration.num_rows", "2"]
    # of two blocks one is to get the high level, of single layers about half
    wanted = next(bits for pair, bits in {"w4w2": 3.4, "w4w3": 3.8, "w8w4": 6.3}.items() if pair in name)
    small += ["--model.initializer.num_steps", "2", "--model.plan.average_bits", str(wanted)]
    run(tmp_path, "score", str(FOLDER / name), *small)
    run(tmp_path, "quantize", str(FOLDER / name), *small)
    plan = QuantPlan.load(tmp_path / "run" / "prepared")
    about = json.loads((tmp_path / "run" / "prepared" / "student.json").read_text())
    assert len({scheme.weight.bits for scheme in plan.values()}) == 2 and about["average_bits"] <= wanted


def llama2(num_blocks: int, hidden: int, intermediate: int) -> list[LayerRef]:
    shapes = {f"self_attn.{role}_proj": (hidden, hidden) for role in "qkvo"}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    layers = [
        LayerRef(f"model.layers.{i}.{name}", i, name.rpartition(".")[2].removesuffix("_proj"), shape)
        for i in range(num_blocks)
        for name, shape in shapes.items()
    ]
    return [*layers, LayerRef("lm_head", None, "lm_head", (32000, hidden))]


@pytest.mark.parametrize(
    ("name", "layers", "high"),
    [("llama2_7b_w4w2_ptq", llama2(32, 4096, 11008), 14), ("llama2_13b_w4w2_ptq", llama2(40, 5120, 13824), 30),
     ("llama2_7b_w4w2", llama2(32, 4096, 11008), None), ("llama2_13b_w4w2", llama2(40, 5120, 13824), None)],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_llama_plans_have_the_bits_their_heads_promise(name, layers, high, tmp_path) -> None:
    members: dict[str, list[str]] = {}
    for layer in layers[:-1]:
        members.setdefault(f"model.layers.{layer.block}", []).append(layer.name)
    importance = {unit: float(i) for i, unit in enumerate(members)}
    Scores("LIM", "block", importance, {unit: tuple(names) for unit, names in members.items()}).save(tmp_path)
    init_args = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]["plan"]["init_args"]
    plan = ByImportance(**{**init_args, "scores": str(tmp_path)}).allocate(layers)
    blocks = {unit for unit, names in members.items() if plan[names[0]].weight.bits == 4}
    if high is not None:
        assert len(blocks) == high and f"{high} of {len(members)} blocks" in (FOLDER / f"{name}.yaml").read_text()
    else:
        assert plan.average_bits(layers) <= init_args["average_bits"] < plan.average_bits(layers) + 0.07


def test_the_overrides_that_the_comment_names_measure_costs_and_spend_by_them(tmp_path: Path) -> None:
    path = FOLDER / "smollm2_w4w2.yaml"
    comment = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    schemes = "[W4A16_ASYM_G64, W3A16_ASYM_G64, W2A16_ASYM_G64]"
    measured = f"--score.scorer OutputKL --score.scorer.schemes '{schemes}' --score.scorer.unit layer"
    plan = "{class_path: Knapsack, init_args: {scores: runs/NAME/scores.json, average_bits: 3.2}}"
    assert measured in comment and f"--model.plan '{plan}'" in comment
    small = ["--trainer.default_root_dir", "run", "--model.student.path", "toy:llama", "--trainer.accelerator", "cpu"]
    small += ["--score.calibration.text", "kdqat:prose", "--score.calibration.num_rows", "2"]
    small += ["--score.calibration.seq_len", "32", "--model.initializer.num_steps", "2"]
    small += ["--score.scorer", "OutputKL", "--score.scorer.schemes", schemes, "--score.scorer.unit", "layer"]
    small += ["--model.plan", plan.replace("runs/NAME", "run")]
    run(tmp_path, "score", str(path), *small)
    run(tmp_path, "quantize", str(path), *small)
    about = json.loads((tmp_path / "run" / "prepared" / "student.json").read_text())
    assert 3.0 < about["average_bits"] <= 3.2  # a ranking of two blocks could only have 2.28 or 3.3
