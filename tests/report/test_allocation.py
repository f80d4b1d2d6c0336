"""Why layers got their bits: in the text, in the JSON and on the page, with the picture of the scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdqat.report import report
from kdqat.report.page import write_page
from kdqat.spec import Allocation, Choice
from tests.report.runs import write_run


def allocated(folder: Path, *, count: int = 3, allocator: str = "ByImportance") -> Path:
    """A run whose plan was weighed up: `count` blocks, the last one the most important, and a head of its own."""
    run = write_run(folder, signals=False)
    ranked = allocator == "ByImportance"
    choices = tuple(
        Choice(f"model.layers.{i}", ("a", "b"), count - i if ranked else None, i / 8, "W4A16_G64" if i else "W2A16_G64",
               4.25 if i else 2.25, None if ranked else 0.0625)
        for i in range(count)
    )  # fmt: skip
    order = "score" if ranked else "least cost"
    fixed = {"lm_head": "W8A16"}
    content = Allocation(allocator, "LIM", order, "3.5 average bits, counted", 8e6, 7e6, choices, fixed).to_json()
    (run / "allocation.json").write_text(json.dumps(content))
    return run


def test_the_text_says_what_the_budget_was_and_why_each_layer_got_its_bits(tmp_path: Path) -> None:
    text = report([allocated(tmp_path / "run")], as_json=False)
    assert "ByImportance by LIM (score): 3.5 average bits, counted, 0.875 MB of 1.000 MB used, 12.50 % left" in text
    rows = [line for line in text.splitlines() if line.startswith(("| model.layers", "| lm_head"))]
    assert rows == [
        "| model.layers.2 | 2 | 1 | 0.25 | W4A16_G64 | 4.250 |  | rank 1 of 3 by LIM (score) |",
        "| model.layers.1 | 2 | 2 | 0.125 | W4A16_G64 | 4.250 |  | rank 2 of 3 by LIM (score) |",
        "| model.layers.0 | 2 | 3 | 0 | W2A16_G64 | 2.250 |  | rank 3 of 3 by LIM (score) |",
        "| lm_head | 1 |  |  | W8A16 |  |  | named in overrides, or an embedding |",
    ]


def test_costs_explain_a_knapsack(tmp_path: Path) -> None:
    text = report([allocated(tmp_path / "run", allocator="Knapsack")], as_json=False)
    assert "| 0.0625 | part of the choice with the least sum of costs; here 0.0625 by LIM |" in text


def test_a_long_list_is_cut_in_the_text_and_whole_in_json_and_on_the_page(tmp_path: Path) -> None:
    run = allocated(tmp_path / "run", count=50)
    text = report([run], as_json=False)
    assert text.count("| model.layers.") == 40 and "11 more follow" in text
    assert len(json.loads(report([run], as_json=True))[0]["allocation"]["choices"]) == 51
    page = write_page([run], tmp_path / "page.html").read_text()
    assert page.count("<td>model.layers.") == 50 and "<summary>51 choices</summary>" in page


def test_the_page_explains_each_run_and_links_the_scores_from_where_it_lies(tmp_path: Path) -> None:
    runs = [allocated(tmp_path / "runs" / "a b"), write_run(tmp_path / "runs" / "other", signals=False)]
    (runs[0] / "scores.png").write_bytes(b"a picture")
    page = write_page(runs, tmp_path / "page.html").read_text()
    start = page.index('id="why-layers-got-their-bits"')
    section = page[start : page.index("</section>", start)]
    assert section.count("<h3>") == 1 and f"<h3>{runs[0]}</h3>" in section
    assert "<td>rank 1 of 3 by LIM (score)</td>" in section and "3.5 average bits" in section
    assert '<a href="runs/a%20b/scores.png">' in section
    assert '<a href="scores.png">' in write_page(runs[:1], None).read_text()
    assert f"Scores: [scores.png]({runs[0]}/scores.png)" in report(runs[:1], as_json=False)


def test_a_run_without_either_says_nothing_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", signals=False)
    assert "got their bits" not in report([run], as_json=False) and "scores.png" not in report([run], as_json=False)
    assert "got their bits" not in write_page([run], None).read_text()


@pytest.mark.parametrize("content", ["{}", "[", '{"choices": [{}], "fixed": {}}'])
def test_a_damaged_file_is_named_with_the_remedy(content: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", signals=False)
    (run / "allocation.json").write_text(content)
    with pytest.raises(ValueError, match=r"allocation\.json is damaged .*delete it and run"):
        report([run], as_json=False)
