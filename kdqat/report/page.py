"""`kdqat report RUN ... --html`: runs side by side on one page that needs nothing but itself: no network, no library.

Heatmaps block x role of what the observers measured, curves over steps, before and after, plan, settings. What a run
does not have is said at the top, and left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kdqat.files import write_text
from kdqat.report.page_chart import Bounds, chart, scale_of
from kdqat.report.page_data import Curve, PageRun, in_order, read_run
from kdqat.report.page_heatmap import MAIN, VIRIDIS, heatmaps
from kdqat.report.page_tables import allocations, before_and_after, environments, events, plans, settings

CURVES = ("train/loss", "train/kl", "val/kl", "val/perplexity")
ROLE_CURVES = (*MAIN, "signal/cosine", "oscillation/oscillating")
OBSERVED = ("grad/", "signal/", "oscillation/")  # columns of metrics.csv that signals.parquet has in full


def write_page(runs: Sequence[Path], file: Path | None) -> Path:
    """Write the page about `runs`; returns where it lies.

    Args:
        file: None: report.html in the run directory, or in the working directory if there are several runs.

    Raises:
        ValueError: if a run is none or named twice, or `file` cannot be a file.
    """
    for run in runs:
        if runs.count(run) > 1:
            raise ValueError(f"{run} is named twice")
    file = file or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if file.is_dir():
        raise ValueError(f"--html {file} is a directory: name a file, or put --html behind the runs")
    write_text(file, page([read_run(run) for run in runs], file.parent))
    return file


def page(runs: Sequence[PageRun], folder: Path) -> str:
    """The page as text; `folder` is where it will lie."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = {
        "Before and after": before_and_after(runs) or "<p>Nothing was evaluated.</p>",
        "Curves": _curves(runs),
        "Layers": _heatmaps(runs),
        "Roles over steps": _role_curves(runs),
        "Said of the whole model": events(runs),
        "Plan": plans(runs),
        "Why layers got their bits": allocations(runs, folder),
        "Settings": settings(runs),
        "Environment": environments(runs),
    }
    shown = {name: content for name, content in sections.items() if content}
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in shown)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{content}</section>' for name, content in shown.items()
    )
    here = Path(__file__).parent
    script = (here / "page.js").read_text().replace("STOPS", json.dumps(VIRIDIS))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>kdqat: {escape(title)}</title><style>{(here / 'page.css').read_text()}</style></head>"
        f"<body><header><h1>{escape(title)}</h1>{_missing(runs)}<nav>{links}</nav></header><main>{body}</main>"
        f'<div id="tip" role="status"></div><script>{script}</script></body></html>\n'
    )


def _missing(runs: Sequence[PageRun]) -> str:
    lines = [f"<li>{escape(run.name)}: {escape(what)}</li>" for run in runs for what in run.missing]
    return f'<ul class="missing">{"".join(lines)}</ul>' if lines else ""


def _curves(runs: Sequence[PageRun]) -> str:
    """What was logged, a panel a number, a line a run."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves if not name.startswith(OBSERVED)))
    parts = {}
    for name in names:
        curves = {run.name: run.curves[name] for run in runs if name in run.curves}
        bounds, log = scale_of(_values(curves.values()))
        colours = [run.name for run in runs]
        parts[name] = chart(name, curves, colours, bounds=bounds, log=log, steps=_steps(curves.values()))
    first = [parts.pop(name) for name in CURVES if name in parts]
    first = first or [parts.pop(name) for name in list(parts)[:2]]
    return _charts(first) + _folded("other curves", list(parts.values()))


def _role_curves(runs: Sequence[PageRun]) -> str:
    """Means over blocks, a panel a run under one scale, a line a role."""
    lines = []
    for name in ROLE_CURVES:
        curves = {run.name: run.signals[name].by_role() for run in runs if name in run.signals}
        every = [curve for roles in curves.values() for curve in roles.values()]
        if any(len(curve) > 1 for curve in every):
            bounds, log = scale_of(_values(every), log=True if "energy" in name else None)
            colours = in_order(role for run in runs for signals in run.signals.values() for role in signals.roles())
            kind: Any = {"bounds": bounds, "log": log, "steps": _steps(every)}
            titles = {run: f"{run}: {name}" if len(runs) > 1 else name for run in curves}
            lines.append([chart(titles[run], roles, colours, **kind) for run, roles in curves.items()])
    if len(runs) == 1:
        return _charts([panel for line in lines for panel in line])
    return "".join(map(_charts, lines))


def _heatmaps(runs: Sequence[PageRun]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.signals))
    if not names:
        return ""
    figures = {
        name: heatmaps(name, {run.name: run.signals[name] for run in runs if name in run.signals}) for name in names
    }
    first = [figures.pop(name) for name in MAIN if name in figures]
    shown = "".join(first or [figures.pop(names[0])])
    return f'<div class="figures">{shown}</div>' + _folded("other measurements", list(figures.values()))


def _values(curves: Iterable[Curve]) -> list[float]:
    return [value for curve in curves for _, value in curve]


def _steps(curves: Iterable[Curve]) -> Bounds:
    steps = [step for curve in curves for step, _ in curve]
    return min(steps), max(steps)


def _charts(parts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


def _folded(name: str, parts: Sequence[str]) -> str:
    return f"<details><summary>{len(parts)} {name}</summary>{_charts(parts)}</details>" if parts else ""


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
