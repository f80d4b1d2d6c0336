"""The page of `kdqat report --html`: well-formed, complete, self-contained, and honest about what is missing."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdqat.report.page import write_page
from kdqat.report.page_chart import log_ticks, place, scale_of, ticks
from kdqat.report.page_data import MAX_STEPS, evenly, read_run, read_signals
from kdqat.report.page_heatmap import VIRIDIS, colour
from tests.report.runs import LAYER_ROLES, write_run, write_signals

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Reads a page and checks that what is opened is closed, in order."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(file.read_text())
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page(*runs: Path) -> Page:
    return Page(write_page(list(runs), runs[0].parent / "page.html"))


def test_one_run_has_every_role_and_block_a_table_and_its_settings(tmp_path: Path) -> None:
    shown = page(write_run(tmp_path / "run"))
    cells = {attributes["data-cell"] for attributes in shown.all("rect")}
    assert {f"block {block}, {role}" for block in range(3) for role in (*LAYER_ROLES, "block")} <= cells
    assert "lm_head" in cells
    for words in ("gradient/energy", "signal/sqnr_db", "oscillation/flipped", "train/loss", "train/kl", "wikitext2",
                  "teacher", "RTN", "student", "75.0 %", "4.125", "model.optimizer.init_args.lr", "1 x H200",
                  "guard/zero_gradient"):  # fmt: skip
        assert words in shown.text, words
    for heading in ("Before and after", "Curves", "Layers", "Roles over steps", "Plan", "Settings", "Environment"):
        assert heading in shown.text


def test_it_needs_nothing_but_itself(tmp_path: Path) -> None:
    page(write_run(tmp_path / "run"))
    text = (tmp_path / "page.html").read_text()
    assert not re.findall(r"https?:|//[a-z]+\.|src=|@import|url\(|<link|fetch\(|XMLHttp", text)


def test_every_drawing_and_slider_says_what_it_is(tmp_path: Path) -> None:
    shown = page(write_run(tmp_path / "run"))
    for drawing in shown.all("svg"):
        assert drawing["role"] == "img" and len(drawing["aria-label"]) > 20
    assert shown.all("input") and all(slider["aria-label"].startswith("step of ") for slider in shown.all("input"))
    assert shown.all("html")[0]["lang"] == "en"


def test_the_last_step_is_drawn_and_the_slider_has_the_others(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", blocks=1, steps=(0, 20, 40), roles=("q",), signals=False)
    write_signals(run / "signals.parquet", [
        (0, "signal", "sqnr_db", 0, "q", "l", 10.0), (20, "signal", "sqnr_db", 0, "q", "l", 15.0),
        (40, "signal", "sqnr_db", 0, "q", "l", 20.0), (40, "signal", "sqnr_db", 0, "q", "twin", 40.0),
    ])  # fmt: skip
    shown = page(run)
    (cell,) = shown.all("rect")
    assert cell["data-values"] == "10 15 30" and cell["data-tip"] == "block 0, q: 30"  # two layers: their mean
    assert cell["fill"] == VIRIDIS[-1]
    (slider,) = shown.all("input")
    assert slider["data-steps"] == "[0, 20, 40]" and slider["value"] == "2"


def test_runs_side_by_side_share_scale_and_colours(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, lr=lr) for name, lr in (("none", 1e-4), ("ov", 1e-3), ("qkv", 1e-2))]
    others = [role for role in LAYER_ROLES if role not in ("q", "k", "v")]
    (runs[2] / "signals.parquet").unlink()
    write_signals(runs[2] / "signals.parquet", [(0, "gradient", "energy", 0, role, "l", 1e3) for role in others])
    shown = page(*runs)
    heats = [attributes for attributes in shown.all("figure") if attributes.get("class", "").startswith("heat")]
    energy = heats[0]
    assert float(energy["data-high"]) == 1e3 and energy["data-log"] == "1"
    for run in runs:
        assert str(run) in shown.text
    text = (tmp_path / "page.html").read_text()
    assert text.count(f"<h4>{runs[2]}</h4>") == 1 and text.count(f"<h4>{runs[0]}</h4>") > 3
    legends = re.findall(r'<li style="--c:var\((--c\d)\)"><i></i>o</li>', text)
    assert len(legends) > 3 and len(set(legends)) == 1  # a role has its colour whether or not others are there
    grey = [cell["data-tip"] for cell in shown.all("rect") if cell.get("class") == "none"]
    assert "block 0, q: no value" in grey and "block 0, o: no value" not in grey
    settings = text[text.index('id="settings"') : text.index("<details>", text.index('id="settings"'))]
    assert "init_args.lr" in settings and "seed_everything" not in settings  # what differs comes first


def test_lines_that_runs_share_stand_once(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, lr=lr, signals=False) for name, lr in (("a", 1e-4), ("b", 1e-3))]
    text = write_page(runs, tmp_path / "page.html").read_text()
    assert text.count("<td>teacher</td><td>all</td>") == 1 and text.count("<td>RTN</td><td>all</td>") == 1
    assert text.count("<td>student</td>") == 2


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>&run", text="</script><img src=x>")
    write_signals(run / "signals.parquet", [(0, "signal", 'a"<i>', 0, 'q"><u>', "l", 1.0)])
    shown = page(run)
    assert not {"b", "u", "img"} & {tag for tag, _ in shown.tags if tag != "b"} and "<b>&run" in shown.text
    assert [cell["data-cell"] for cell in shown.all("rect")] == ['block 0, q"><u>']
    assert "</script><img src=x>" in shown.text


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", signals=False)
    for name in ("metrics.csv", "eval.json", "environment.json"):
        (run / name).unlink()
    shown = page(run)
    for words in ("no metrics.csv", "no signals.parquet", "GradientLog, SignalLog or OscillationLog", "no eval.json"):
        assert words in shown.text
    assert "model.optimizer.init_args.lr" in shown.text and not shown.all("rect")


def test_a_damaged_signals_file_is_said_not_died_of(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", signals=False)
    (run / "signals.parquet").write_bytes(b"PAR1 nothing")
    assert "signals.parquet cannot be read" in page(run).text


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("value", ["high"], "a column is not of its type"),
        ("role", [[1]], "a column is not of its type"),
        ("block", ["first"], "a column is not of its type"),
        ("step", [None], "step is missing in some rows"),
    ],
)
def test_signals_with_a_column_of_another_type_are_said_to_be_unreadable(
    name: str, values: list[object], words: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", signals=False)
    columns = {"step": [0], "source": ["signal"], "metric": ["gain"], "block": [0], "role": ["q"], "layer": ["l"]}
    pq.write_table(pa.table({**columns, "value": [1.0], name: values}), run / "signals.parquet")
    assert any("signals.parquet cannot be read" in text and words in text for text in read_run(run).missing)


def test_values_that_are_none_are_grey_and_leave_the_scale_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", signals=False)
    values = {"q": math.nan, "k": math.inf, "v": 0.0, "o": 1e-6, "up": 1e-2}
    write_signals(run / "signals.parquet", [(0, "gradient", "energy", 0, r, "l", v) for r, v in values.items()])
    shown = page(run)
    grey = {cell["data-cell"] for cell in shown.all("rect") if cell.get("class") == "none"}
    assert grey == {"block 0, q", "block 0, k", "block 0, v"}
    (figure,) = [attributes for attributes in shown.all("figure") if "data-low" in attributes]
    assert (float(figure["data-low"]), float(figure["data-high"])) == (1e-6, 1e-2)


def test_long_runs_are_thinned_with_first_and_last_kept(tmp_path: Path) -> None:
    path = tmp_path / "signals.parquet"
    write_signals(path, [(step, "signal", "gain", 0, "q", "l", float(step)) for step in range(0, 5000, 10)])
    signals, _ = read_signals(path)
    steps = sorted(signals["signal/gain"].steps)
    assert len(steps) == MAX_STEPS and (steps[0], steps[-1]) == (0, 4990)
    assert evenly([1, 2, 3], 5) == [1, 2, 3]
    run = write_run(tmp_path / "run", steps=(0, 3000))
    assert len(read_run(run).curves["train/loss"]) <= 400


@pytest.mark.parametrize(
    ("values", "bounds", "log"),
    [
        ([1.0, 2.0], (1.0, 2.0), False),
        ([1e-4, 1.0], (1e-4, 1.0), True),
        ([-1.0, 1000.0], (-1.0, 1000.0), False),
        ([math.nan, math.inf], (0.0, 1.0), False),
        ([], (0.0, 1.0), False),
    ],
)
def test_scales(values: list[float], bounds: tuple[float, float], log: bool) -> None:
    assert scale_of(values) == (bounds, log)


def test_ticks_are_round_and_lie_within() -> None:
    assert ticks((0.0, 300.0)) == [0, 100, 200, 300]
    assert ticks((0.13, 0.87)) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert log_ticks((3e-5, 2.0)) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert ticks((2.0, 2.0)) == [2.0] and place(5.0, (5.0, 5.0), False) == 0.5


def test_colours_go_from_end_to_end() -> None:
    assert colour(0.0, (0.0, 1.0), False) == VIRIDIS[0] and colour(1.0, (0.0, 1.0), False) == VIRIDIS[-1]
    assert colour(1e-2, (1e-4, 1.0), True) == VIRIDIS[5] and colour(0.0, (1e-4, 1.0), True) == ""


def test_the_command_writes_the_page_beside_the_run_without_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", signals=False)
    code = (
        "import sys\nfrom kdqat.cli.main import main\nmain(['report', 'one', '--html'])\n"
        "main(['report', 'one', 'two', '--html'])\nmain(['report', 'one', 'two', '--html', 'both.html'])\n"
        "print([n for n in ('torch', 'transformers', 'lightning') if n in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["one/report.html", "report.html", "both.html", "[]"]
    assert (tmp_path / "report.html").read_text() == (tmp_path / "both.html").read_text()


def test_a_directory_instead_of_a_file_and_a_run_named_twice_are_errors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="put --html behind the runs"):
        write_page([run], run)
    with pytest.raises(ValueError, match="named twice"):
        write_page([run, run], None)
    with pytest.raises(ValueError, match="no run directory"):
        write_page([tmp_path], None)
