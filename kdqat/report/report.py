"""`kdqat report RUN ...`: what is in a run directory, as Markdown or JSON. Reads files, imports no torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdqat.report.run_dir import RunDir
from kdqat.report.table import markdown
from kdqat.spec import ALLOCATION_FILE, PLAN_FILE, QuantPlan, describe_budget, explain_allocation

SCORES_PLOT = "scores.png"
MAX_CHOICES = 40  # rows of why layers got their bits, in the text
CHOICE_COLUMNS = ("unit", "layers", "rank", "importance", "scheme", "bits", "cost", "why")


def describe(run: Path) -> dict[str, Any]:
    """Everything a run directory says, as plain data.

    Raises:
        ValueError: if `run` is no run directory, or one of its files is damaged.
    """
    directory = RunDir(run)
    if not directory.recipe.is_file():
        raise ValueError(f"{run}: no recipe.yaml there, so this is no run directory")
    facts: dict[str, Any] = {"run": str(run), "environment": directory.read_json("environment.json")}
    for folder in (directory.student, directory.prepared):
        if (folder / PLAN_FILE).is_file():
            plan = QuantPlan.load(folder)
            facts["plan"] = plan.to_json()["schemes"]
            facts["student"] = RunDir(folder).read_json("student.json")
            break
    for name in ("baseline.json", "eval.json", "validation.json", "adapters.json"):
        facts[name.removesuffix(".json")] = directory.read_json(name)
    facts["allocation"] = _allocation(directory)
    facts["scores_plot"] = SCORES_PLOT if (run / SCORES_PLOT).is_file() else None
    facts["last_metrics"] = _last_metrics(run / "metrics.csv")
    facts["exports"] = sorted(p.name for p in directory.export.glob("*")) if directory.export.is_dir() else []
    return facts


def as_markdown(facts: dict[str, Any]) -> str:
    """`describe`'s facts as a page."""
    env = facts["environment"] or {}
    lines = [f"# {facts['run']}", ""]
    lines += [f"`{env.get('command', '?')}` · commit {env.get('commit')} · {env.get('hardware')}", ""]
    if facts.get("student"):
        about = facts["student"]
        lines += [
            f"{about['layers']} layers quantized ({', '.join(facts['plan'])}), "
            f"{about['average_bits']:.3f} bits a weight counted with scales, {about['nominal_bits']:.3f} nominal; "
            f"{100 * about['share_full_precision']:.1f} % of the matmul weights stay in full precision "
            f"({', '.join(about['ignored']) or 'none'}).",
            "",
        ]
    if facts["allocation"]:
        lines += [*_allocation_lines(facts["allocation"]), ""]
    if facts["scores_plot"]:
        lines += [f"Scores: [{facts['scores_plot']}]({facts['run']}/{facts['scores_plot']})", ""]
    if facts["eval"]:
        lines += [markdown(facts["eval"]), ""]
    if facts["validation"]:
        numbers = ", ".join(f"{k} {v:.4f}" for k, v in facts["validation"].items() if k != "student")
        lines += [f"Validation of {facts['validation']['student']}/: {numbers}", ""]
    if facts["adapters"]:
        lines += [*_adapter_lines(facts["adapters"]), ""]
    if facts["last_metrics"]:
        lines += ["Last logged: " + ", ".join(f"{k} {v}" for k, v in facts["last_metrics"].items()), ""]
    if facts["exports"]:
        lines += [f"Exports: {', '.join(facts['exports'])}", ""]
    return "\n".join(lines)


def choice_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of `explain_allocation` as text, by CHOICE_COLUMNS; what there is none of is empty."""
    formats = {"importance": ".4g", "bits": ".3f", "cost": ".4g"}
    return ["" if row[name] is None else format(row[name], formats.get(name, "")) for name in CHOICE_COLUMNS]


def _allocation(directory: RunDir) -> dict[str, Any] | None:
    """What the budget was and a row for each choice; None where the plan was not weighed up.

    Raises:
        ValueError: if the file is damaged.
    """
    content = directory.read_json(ALLOCATION_FILE)
    if content is None:
        return None
    try:
        return {"budget": describe_budget(content), "choices": explain_allocation(content)}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        path = directory.path / ALLOCATION_FILE
        raise ValueError(f"{path} is damaged ({error!r}); delete it and run `kdqat quantize --overwrite`") from error


def _allocation_lines(allocation: Mapping[str, Any]) -> list[str]:
    choices = allocation["choices"]
    lines = [f"Why layers got their bits: {allocation['budget']}.", "", "| " + " | ".join(CHOICE_COLUMNS) + " |"]
    lines.append("| --- | ---: | ---: | ---: | --- | ---: | ---: | --- |")
    lines += ["| " + " | ".join(choice_cells(row)) + " |" for row in choices[:MAX_CHOICES]]
    if len(choices) > MAX_CHOICES:
        lines += ["", f"{len(choices) - MAX_CHOICES} more follow; --json and --html have them all."]
    return lines


def _adapter_lines(adapters: dict[str, Any]) -> list[str]:
    merged, outside = adapters["merged"], adapters["outside"]
    if merged["layers"]:
        change = f"the largest change of a fake-quantized weight was {merged['largest_change']:.1e}"
        return [f"Adapters of {merged['layers']} layers are merged into student/ (adapter/ holds them): {change}."]
    lines = [
        "Adapters outside of the fake quantizer belong to student/. Quantizing merged weights anew would change:",
        "",
    ]
    lines += ["| role | layers | codes changed | SQNR |", "| --- | ---: | ---: | ---: |"]
    for role, numbers in outside.items():
        changed = f"{100 * numbers['codes_changed']:.1f} %"
        lines.append(f"| {role} | {numbers['layers']} | {changed} | {numbers['sqnr_db']:.1f} dB |")
    return lines


def report(runs: list[Path], as_json: bool) -> str:
    """The text `kdqat report` prints for these runs."""
    all_facts = [describe(run) for run in runs]
    return json.dumps(all_facts, indent=1) if as_json else "\n".join(map(as_markdown, all_facts))


def _last_metrics(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    last: dict[str, str] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            last.update({k: v for k, v in row.items() if v})
    return last
