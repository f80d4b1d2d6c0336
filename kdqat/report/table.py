"""The table at the end of a run: teacher, RTN and student side by side; the same numbers as JSON. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("text", "model", "perplexity", "KL mean", "KL p95", "top-1", "RTN's KL removed", "MB")


def rows(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the table, a line per text and model.

    Args:
        evaluation: {"models": {"rtn": {label: numbers}, "student": {label: numbers}}, "bytes": {...}}, as eval.json.
    """
    models, sizes = evaluation["models"], evaluation["bytes"]
    labels = list(dict.fromkeys(label for numbers in models.values() for label in numbers))
    table: list[tuple[str, ...]] = []
    for label in labels:
        per_model = {name: numbers[label] for name, numbers in models.items() if label in numbers}
        teacher = next((n["teacher_perplexity"] for n in per_model.values() if "teacher_perplexity" in n), None)
        if teacher is not None:
            table.append((label, "teacher", f"{teacher:.2f}", "", "", "", "", _mb(sizes.get("teacher"))))
        for name, numbers in per_model.items():
            removed = removed_share(per_model.get("rtn"), numbers) if name != "rtn" else None
            table.append(
                (
                    label,
                    "RTN" if name == "rtn" else name,
                    _number(numbers.get("perplexity"), 2),
                    _number(numbers.get("kl_mean"), 4),
                    _number(numbers.get("kl_p95"), 3),
                    _percent(numbers.get("top1")),
                    _percent(removed),
                    _mb(sizes.get("student")),
                )
            )
    return table


def removed_share(rtn: Mapping[str, float] | None, student: Mapping[str, float]) -> float | None:
    """Share of RTN's KL to the teacher that the student no longer has; None where it cannot be said."""
    if not rtn or not rtn.get("kl_mean") or "kl_mean" not in student:
        return None
    return 1 - student["kl_mean"] / rtn["kl_mean"]


def markdown(evaluation: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(evaluation)]
    return "\n".join(lines)


def print_table(evaluation: Mapping[str, Any], title: str) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    previous = None
    for row in rows(evaluation):
        if previous not in (None, row[0]):
            table.add_section()
        previous = row[0]
        table.add_row(*row)
    console = Console()
    if console.is_terminal and console.width >= 100:
        console.print(table)
    else:
        print(markdown(evaluation))


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _mb(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"
