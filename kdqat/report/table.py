"""The table at the end of a run: teacher, RTN and student side by side; the same numbers as JSON. No torch.

Encoders have no logits: what `EmbeddingAgreement` measured is a table of its own, below the one of texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("text", "model", "perplexity", "KL mean", "KL p95", "top-1", "RTN's KL removed", "MB")
EMBEDDING_COLUMNS = ("sentences", "model", "cosine mean", "cosine p5", "similarity Spearman", "MB")

Columns = tuple[str, ...]
Rows = list[tuple[str, ...]]


def tables(evaluation: Mapping[str, Any]) -> list[tuple[Columns, Rows]]:
    """Columns and lines of every table, a line per text and model; sentences come second.

    Args:
        evaluation: {"models": {"rtn": {label: numbers}, "student": {label: numbers}}, "bytes": {...}}, as eval.json.
    """
    models, sizes = evaluation["models"], evaluation["bytes"]
    texts: dict[str, Mapping[str, Any]] = {}
    sentences: dict[str, Mapping[str, Any]] = {}
    for label in dict.fromkeys(label for numbers in models.values() for label in numbers):
        per_model = {name: numbers[label] for name, numbers in models.items() if label in numbers}
        embeddings = any("cosine_mean" in numbers for numbers in per_model.values())
        (sentences if embeddings else texts)[label] = per_model
    found = [(COLUMNS, _text_rows(texts, sizes)), (EMBEDDING_COLUMNS, _embedding_rows(sentences, sizes))]
    return [table for table in found if table[1]] or found[:1]


def _text_rows(labels: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> Rows:
    table: Rows = []
    for label, per_model in labels.items():
        teacher = next((n["teacher_perplexity"] for n in per_model.values() if "teacher_perplexity" in n), None)
        if teacher is not None:
            table.append((label, "teacher", f"{teacher:.2f}", "", "", "", "", _mb(sizes.get("teacher"))))
        for name, numbers in per_model.items():
            removed = removed_share(per_model.get("rtn"), numbers) if name != "rtn" else None
            table.append(
                (
                    label,
                    _shown(name),
                    _number(numbers.get("perplexity"), 2),
                    _number(numbers.get("kl_mean"), 4),
                    _number(numbers.get("kl_p95"), 3),
                    _percent(numbers.get("top1")),
                    _percent(removed),
                    _mb(sizes.get("student")),
                )
            )
    return table


def _embedding_rows(labels: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> Rows:
    table: Rows = []
    for label, per_model in labels.items():
        table.append((label, "teacher", "", "", "", _mb(sizes.get("teacher"))))  # everything is measured against it
        for name, numbers in per_model.items():
            measured = (_number(numbers.get(key), 4) for key in ("cosine_mean", "cosine_p5", "similarity_spearman"))
            table.append((label, _shown(name), *measured, _mb(sizes.get("student"))))
    return table


def removed_share(rtn: Mapping[str, float] | None, student: Mapping[str, float]) -> float | None:
    """Share of RTN's KL to the teacher that the student no longer has; None where it cannot be said."""
    if not rtn or not rtn.get("kl_mean") or "kl_mean" not in student:
        return None
    return 1 - student["kl_mean"] / rtn["kl_mean"]


def markdown(evaluation: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    return "\n\n".join(_as_markdown(columns, rows) for columns, rows in tables(evaluation))


def print_table(evaluation: Mapping[str, Any], title: str) -> None:
    """The tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal or console.width < 100:
        print(markdown(evaluation))
        return
    for columns, rows in tables(evaluation):
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
        previous = None
        for row in rows:
            if previous not in (None, row[0]):
                table.add_section()
            previous = row[0]
            table.add_row(*row)
        console.print(table)


def _as_markdown(columns: Columns, rows: Rows) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _shown(model: str) -> str:
    return "RTN" if model == "rtn" else model


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _mb(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"
