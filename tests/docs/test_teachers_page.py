"""The sizes on the page about teachers are those that the code computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kdqat.models.teacher_cache import row_bytes
from kdqat.models.top_k import ids_dtype

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "teachers.md").read_text()
ROW = re.compile(r"^\| ([\w.-]+) \| (\d+) \| (\d+) \| (\d+) GB \| (\d+) GB \| (\d+) GB \|$", re.MULTILINE)
TOKENS, SEQ_LEN = 100_000_000, 1024


def gigabytes(kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    return round(row_bytes(kinds) * TOKENS / SEQ_LEN / 1e9)


@pytest.mark.parametrize("row", ROW.findall(PAGE), ids=lambda row: row[0])
def test_the_table_of_sizes_is_the_formula(row: tuple[str, ...]) -> None:
    width, vocabulary, hidden, *top = map(int, row[1:])
    assert gigabytes({"hidden": (torch.bfloat16, (SEQ_LEN, width))}) == hidden
    for k, size in zip((64, 16), top, strict=True):
        ids, values = (ids_dtype(vocabulary), (SEQ_LEN, k)), (torch.float16, (SEQ_LEN, k))
        assert gigabytes({"ids": ids, "log_probs": values, "log_tail": (torch.float32, (SEQ_LEN,))}) == size


def test_the_table_has_rows() -> None:
    assert len(ROW.findall(PAGE)) == 3
