"""The tables of a run: texts for models with logits, sentences for encoders, and what stands in which column."""

from __future__ import annotations

from typing import Any

import pytest

from kdqat.report import markdown
from kdqat.report.table import COLUMNS, EMBEDDING_COLUMNS, print_table, tables

AGREEMENT = {"cosine_mean": 0.98765, "cosine_p5": 0.9, "similarity_spearman": 0.95, "sentences": 20.0}
TEXT = {"perplexity": 12.0, "teacher_perplexity": 10.0, "kl_mean": 0.1, "kl_p95": 0.3, "top1": 0.9, "tokens": 64.0}


def evaluation(**models: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {"models": models, "bytes": {"teacher": 4_000_000, "student": 1_000_000}}


def test_an_encoder_has_a_table_of_its_own_and_every_number_is_in_it() -> None:
    measured = evaluation(rtn={"s": {**AGREEMENT, "cosine_mean": 0.5}}, student={"s": AGREEMENT})
    ((columns, rows),) = tables(measured)
    assert columns == EMBEDDING_COLUMNS
    assert rows == [
        ("s", "teacher", "", "", "", "4.0"),
        ("s", "RTN", "0.5000", "0.9000", "0.9500", "1.0"),
        ("s", "student", "0.9877", "0.9000", "0.9500", "1.0"),
    ]


def test_texts_and_sentences_of_one_recipe_are_two_tables_with_an_empty_line_between() -> None:
    measured = evaluation(student={"s": AGREEMENT, "t": TEXT, "u": TEXT})
    assert [columns for columns, _ in tables(measured)] == [COLUMNS, EMBEDDING_COLUMNS]
    first, second = markdown(measured).split("\n\n")
    assert first.startswith("| text |") and second.startswith("| sentences |")
    assert "| s |" not in first and "| t |" not in second and "| u |" in first
    for table in (first, second):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_numbers_of_an_evaluator_of_ones_own_leave_a_line_of_the_first_table() -> None:
    ((columns, rows),) = tables(evaluation(student={"t": {"hidden_cosine": 0.9}}))
    assert columns == COLUMNS and [row[:2] for row in rows] == [("t", "student")]


def test_a_run_that_measured_nothing_has_the_head_of_a_table() -> None:
    assert markdown(evaluation(student={})).splitlines()[0] == "| " + " | ".join(COLUMNS) + " |"


def test_an_encoder_whose_pairs_have_no_order_says_nan() -> None:
    ((_, rows),) = tables(evaluation(student={"s": {**AGREEMENT, "similarity_spearman": float("nan")}}))
    assert rows[-1][4] == "nan"


def test_what_is_no_terminal_gets_the_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    measured = evaluation(student={"s": AGREEMENT, "t": TEXT})
    print_table(measured, "run")
    assert capsys.readouterr().out == markdown(measured) + "\n"


def test_a_wide_terminal_gets_both_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    print_table(evaluation(student={"s": AGREEMENT, "t": TEXT}), "run")
    printed = capsys.readouterr().out
    assert "similarity Spearman" in printed and "RTN's KL removed" in printed and "0.9877" in printed
