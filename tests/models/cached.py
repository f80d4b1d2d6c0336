"""Rows, and a filled cache of a toy's answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdqat.data import Rows
from kdqat.models import CachedTeacher, FrozenTeacher, ModelSource, SplitModel
from kdqat.models.toy import toy_tokenizer

SOURCE = ModelSource("toy:llama")


def rows(num: int = 6, tokens: int = 12, seed: int = 0) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    return Rows(torch.randint(3, 256, (num, tokens), generator=draw, dtype=torch.int32))


def cached(folder: Path, *, dtype: str = "float32", path: str | None = None, source: ModelSource = SOURCE,
           student: SplitModel | None = None, tokenizer: Any = None, **kwargs: Any) -> CachedTeacher:  # fmt: skip
    """A prepared teacher that reads `folder`."""
    teacher = CachedTeacher(FrozenTeacher(path, dtype=dtype), folder=str(folder), **{"k": 8, **kwargs})
    student = student if student is not None else SplitModel(source.load_model())
    teacher.prepare(source, student, tokenizer or toy_tokenizer(), pristine=True)
    teacher.place(torch.device("cpu")) if teacher.cache and len(teacher.cache) else None
    return teacher


def fill(teacher: CachedTeacher, data: Rows, batches: Sequence[Sequence[int]] = ((0, 1, 2), (3, 4, 5)),
         source: ModelSource = SOURCE) -> CachedTeacher:  # fmt: skip
    """Let the live teacher answer these rows; the cache is then open for reading."""
    teacher.teacher.prepare(source, SplitModel(source.load_model()), toy_tokenizer(), pristine=True)
    assert sum(teacher.fill(data.batch(torch.tensor(batch)) for batch in batches)) == sum(map(len, batches))
    return teacher
