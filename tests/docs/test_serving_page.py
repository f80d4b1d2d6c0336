"""The page "From a run to vLLM, llama.cpp, transformers" says what the exporters and the gate say."""

from __future__ import annotations

import re
from pathlib import Path

from kdqat.exporters.parity_logits import TOLERANCES
from tests.benchmarks.export_table import table

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()


def test_the_table_of_formats_is_what_the_exporters_refuse_and_hold():
    written = re.search(r"<!-- made by .*? -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert written is not None and written[1] == table(), "python tests/benchmarks/export_table.py writes it anew"


def test_the_tolerances_are_those_of_the_gate():
    for dtype, tolerance in TOLERANCES.items():
        numbers = (tolerance.max_difference, tolerance.kl_mean, tolerance.kl_p95)
        assert f"| {dtype} | {' | '.join(map(str, numbers))} |" in PAGE
