"""Run directories as fit and the observers leave them, without training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

LAYER_ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def write_run(folder: Path, *, blocks: int = 3, steps: Sequence[int] = (0, 20, 40), lr: float = 1e-4,
              signals: bool = True, roles: Sequence[str] = LAYER_ROLES, text: str = "wikitext2") -> Path:  # fmt: skip
    """A run directory with recipe, environment, metrics, evaluation and (on request) signals."""
    rng = random.Random(str(folder.name))
    folder.mkdir(parents=True)
    recipe = {
        "seed_everything": 0,
        "model": {"student": {"path": "toy:llama"}, "plan": {"class_path": "Uniform", "init_args": {"scheme": "W4A16"}},
                  "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}},
        "trainer": {"max_steps": steps[-1], "default_root_dir": str(folder)},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = {"command": "kdqat fit recipe.yaml", "versions": {"torch": "2.13"}, "commit": "abc", "hardware": "1 x H200"}
    (folder / "environment.json").write_text(json.dumps(made))
    numbers = {"kl_mean": 0.8, "kl_p95": 2.0, "top1": 0.7, "perplexity": 30.0, "teacher_perplexity": 20.0}
    models = {"rtn": {text: numbers}, "student": {text: {**numbers, "kl_mean": 0.2 + lr, "perplexity": 22.0}}}
    size = {"bytes": {"student": 113e6, "teacher": 269e6}, "average_bits": 4.125, "nominal_bits": 4}
    evaluation = {"models": models, **size, "layers": 7 * blocks, "ignored": ["lm_head"], "share_full_precision": 0.2}
    (folder / "eval.json").write_text(json.dumps(evaluation))
    lines = ["step,train/loss,train/kl,epoch,grad/o/energy"]
    lines += [f"{s},{0.9 / (1 + s / 30) + rng.random() / 20},{0.8 / (1 + s / 30)},0,1" for s in range(steps[-1])]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if signals:
        write_signals(folder / "signals.parquet", rows(rng, blocks, steps, roles))
    return folder


def rows(rng: random.Random, blocks: int, steps: Sequence[int], roles: Sequence[str]) -> list[tuple[Any, ...]]:
    """Rows of signals.parquet, (step, source, metric, block, role, layer, value)."""
    made: list[tuple[Any, ...]] = [(steps[-1], "guard", "zero_gradient", -1, "", "", 1.0)]
    for step in steps:
        for block in range(blocks):
            for index, role in enumerate(roles):
                layer, wave = f"model.layers.{block}.{role}", math.sin(block / 4 + index)
                energy = 10 ** (-4 - step / 100 + 2 * wave + rng.random())
                made.append((step, "gradient", "energy", block, role, layer, energy))
                made.append((step, "signal", "sqnr_db", block, role, layer, 12 + 6 * wave + step / 30))
                made.append((step, "oscillation", "flipped", block, role, layer, 0.01 * abs(wave) / (1 + step / 50)))
                made.append((step, "oscillation", "clipped", block, role, layer, 0.001 * index))
            sqnr = 9 - block / 10 + step / 30
            made.append((step, "signal", "sqnr_db", block, "block", f"model.layers.{block}", sqnr))
        made.append((step, "signal", "sqnr_db", -1, "lm_head", "lm_head", 20.0))
    return made


def write_signals(path: Path, made: Sequence[tuple[Any, ...]]) -> None:
    """A signals.parquet with the columns that observers write."""
    names = ("step", "source", "metric", "block", "role", "layer", "value")
    kinds = (pa.int64(), pa.string(), pa.string(), pa.int32(), pa.string(), pa.string(), pa.float64())
    columns = [list(column) for column in zip(*made, strict=True)]
    pq.write_table(pa.table(columns, schema=pa.schema(list(zip(names, kinds, strict=True)))), path)
