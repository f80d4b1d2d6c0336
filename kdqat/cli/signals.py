"""The verb `signals`: what quantization does to the signal of a run's student, by role, and what to freeze."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from kdqat import api
from kdqat.cli.session import begin, console, device_of, start, teacher_of
from kdqat.report.recommend import RATIO, recommend, role_table
from kdqat.student import load_student


def signals(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Measure student/ (or prepared/, or what the recipe prepares) against the teacher, into signals.json."""
    if options.num_tokens < 2:
        raise ValueError(f"--num_tokens must be at least 2, not {options.num_tokens}: the gradients need a next token")
    recipe = begin("signals", options, overrides)
    device = device_of(recipe.trainer.get("accelerator"))
    folder = next((folder for folder in (recipe.run.student, recipe.run.prepared) if folder.is_dir()), None)
    student = recipe.model.prepare(device=device) if folder is None else load_student(folder)
    teacher = teacher_of(recipe).judge()
    rows = api.signals(student, teacher, options.text, num_rows=options.num_rows, num_tokens=options.num_tokens,
                       device=device)  # fmt: skip
    start("signals", recipe, options)
    content: dict[str, Any] = {
        "student": "not saved" if folder is None else folder.name,
        "text": options.text,
        "rows": [{**row, "value": row["value"] if math.isfinite(row["value"]) else None} for row in rows],
    }
    console.print(f"student: {content['student']}; medians over layers, the lowest SQNR first")
    print(role_table(rows))
    recipe.run.write_json("signals.json", content)  # what was measured is kept, whatever can be said of it
    if any(row["metric"] == RATIO for row in rows):
        answer = recommend(rows)
        content["recommendation"] = {"ratios": answer.ratios, "freeze": list(answer.freeze)}
        recipe.run.write_json("signals.json", content)
        print(answer.sentence())
