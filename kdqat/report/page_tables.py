"""Tables of the page: before and after, the plan, settings that differ, what made the runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kdqat.report.page_data import PageRun
from kdqat.report.report import CHOICE_COLUMNS, choice_cells
from kdqat.report.table import tables

MAX_EVENTS = 60
MAX_CHOICES = 40  # shown; a longer table is folded away


def before_and_after(runs: Sequence[PageRun]) -> str:
    """Teacher, RTN and student of every run, text by text; a line that two runs share stands once."""
    found: dict[tuple[str, ...], dict[tuple[str, ...], list[str]]] = {}
    for run in runs:
        for columns, measured in tables(run.facts["eval"]) if run.facts["eval"] else []:
            for row in measured:
                found.setdefault(columns, {}).setdefault(row, []).append(run.name)
    parts = []
    for columns, rows in found.items():
        texts, models = (list(dict.fromkeys(row[i] for row in rows)) for i in (0, 1))
        ordered = sorted(rows, key=lambda row: (texts.index(row[0]), models.index(row[1])))
        names = [_which(rows[row], runs) for row in ordered]
        several = len(runs) > 1
        head = [*columns[:2], *(["run"] if several else []), *columns[2:]]
        lines = [[*row[:2], *([name] if several else []), *row[2:]] for row, name in zip(ordered, names, strict=True)]
        parts.append(table(head, lines, words=2 + several, group=0))
    return "".join(parts)


def plans(runs: Sequence[PageRun]) -> str:
    """What is quantized, run by run."""
    lines = []
    for run in runs:
        about: Mapping[str, Any] = run.facts.get("student") or run.facts["eval"] or {}
        if "average_bits" not in about:
            lines.append([run.name, "", "", "", "", ""])
            continue
        schemes = ", ".join(run.facts.get("plan") or []) or run.recipe.get("model.plan.init_args.scheme", "")
        ignored = ", ".join(about["ignored"]) or "none"
        size = (run.facts["eval"] or {}).get("bytes", {}).get("student")
        lines.append([
            run.name, str(schemes), str(about["layers"]), f"{about['average_bits']:.3f} ({about['nominal_bits']:.3g})",
            f"{100 * about['share_full_precision']:.1f} %: {ignored}", f"{size / 1e6:.1f}" if size else "",
        ])  # fmt: skip
    head = ["run", "scheme", "layers", "bits counted (nominal)", "left in full precision", "MB"]
    return table(head, lines, words=len(head))


def allocations(runs: Sequence[PageRun], folder: Path) -> str:
    """Why layers got their bits, and a link to the picture of their scores; nothing where no plan was weighed up.

    Args:
        folder: of the page, which links start from.
    """
    parts = []
    for run in runs:
        allocation, plot, said = run.facts["allocation"], run.facts["scores_plot"], []
        if allocation:
            rows = [choice_cells(row) for row in allocation["choices"]]
            shown = table(CHOICE_COLUMNS, rows, words=len(CHOICE_COLUMNS))
            if len(rows) > MAX_CHOICES:
                shown = f"<details><summary>{len(rows)} choices</summary>{shown}</details>"
            said += [f"<p>{escape(allocation['budget'])}</p>", shown]
        if plot:
            link = quote(os.path.relpath(Path(run.name) / plot, folder))
            said.append(f'<p><a href="{link}">{escape(plot)}</a>: the scores, drawn by <code>kdqat score</code></p>')
        if said:
            parts.append((f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "") + "".join(said))
    return "".join(parts)


def settings(runs: Sequence[PageRun]) -> str:
    """Keys of the recipes: those that differ are shown, all can be unfolded."""
    keys = list(dict.fromkeys(key for run in runs for key in run.recipe))

    def line(key: str) -> list[str]:
        return [key, *("" if key not in run.recipe else str(run.recipe[key]) for run in runs)]

    lines = [line(key) for key in keys]
    head = ["key", *(run.name for run in runs)]
    everything = f"<details><summary>all {len(lines)} settings</summary>{table(head, lines, words=len(head))}</details>"
    if len(runs) == 1:
        return everything
    differing = [cells for cells in lines if len({*cells[1:]}) > 1 and cells[0] != "trainer.default_root_dir"]
    shown = table(head, differing, words=len(head)) if differing else "<p>The settings are the same.</p>"
    return f"<p>What differs:</p>{shown}{everything}"


def environments(runs: Sequence[PageRun]) -> str:
    """Command, commit, hardware and versions."""
    rows: dict[str, list[str]] = {}
    for index, run in enumerate(runs):
        made = run.facts["environment"] or {}
        versions = " ".join(f"{name} {version}" for name, version in (made.get("versions") or {}).items())
        for key, value in {**{k: v for k, v in made.items() if k != "versions"}, "versions": versions}.items():
            rows.setdefault(key, [""] * len(runs))[index] = str(value)
    head = ["", *(run.name for run in runs)]
    return table(head, [[key, *values] for key, values in rows.items()], words=len(head))


def events(runs: Sequence[PageRun]) -> str:
    """What was said of the whole model (guards); nothing where nothing was said."""
    said = [(run.name, step, f"{source}/{metric}", value) for run in runs for step, source, metric, value in run.events]
    lines = [[name, str(step), what, f"{value:.4g}"] for name, step, what, value in said[:MAX_EVENTS]]
    more = f"<p>{len(said) - MAX_EVENTS} more are not shown.</p>" if len(said) > MAX_EVENTS else ""
    return table(["run", "step", "what", "value"], lines, words=3) + more if lines else ""


def table(head: Sequence[str], lines: Sequence[Sequence[str]], *, words: int, group: int | None = None) -> str:
    """An HTML table; the first `words` columns are words, the others numbers.

    Args:
        group: a rule is drawn where this column changes.
    """
    kinds = ["" if index < words else ' class="n"' for index in range(len(head))]
    top = "".join(f"<th scope=col{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    body, before = [], None
    for cells in lines:
        rule = ' class="rule"' if group is not None and before not in (None, cells[group]) else ""
        before = cells[group] if group is not None else None
        row = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, cells, strict=True))
        body.append(f"<tr{rule}>{row}</tr>")
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _which(names: Sequence[str], runs: Sequence[PageRun]) -> str:
    return "all" if len(names) == len(runs) else ", ".join(names)
