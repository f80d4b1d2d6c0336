"""What an evaluator is: it owns the text it evaluates on and turns a student into a few numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from kdqat.data import TextSource, windows
from kdqat.models import Teacher
from kdqat.student import Student
from kdqat.types import Batch, Outputs

T = TypeVar("T")
Protocol = Literal["packed", "wikitext2", "ptb"]


class Evaluator(ABC):
    """Numbers about a student.

    Attributes:
        label: names this evaluator's numbers in eval.json and in tables.
    """

    label: str

    @abstractmethod
    def evaluate(self, student: Student, teacher: Teacher | None) -> dict[str, float]:
        """Named numbers; the model is where the caller put it, and is left in the mode it was in.

        Raises:
            ValueError: if it needs the teacher and there is none, or its text cannot be had.
        """


class TextEvaluator(Evaluator):
    """An evaluator that reads a text window by window. Windows never overlap and each is fed alone.

    Args:
        text: a path, "python_docs:heldout", "kdqat:prose" or a TextSource; see data/texts.py.
        label: default: the text's own name.
        seq_len: tokens in a window.
        protocol: "packed" joins documents with EOS; "wikitext2" and "ptb" are what papers report (blank-line pattern
            and `\\n\\n` join, lines joined with a space; tokenized once).
        limit: at most so many windows, from the start; None: all.
        batch_size: windows fed at once.
    """

    def __init__(
        self,
        text: str | TextSource | list[str | TextSource],
        *,
        label: str | None = None,
        seq_len: int = 512,
        protocol: Protocol = "packed",
        limit: int | None = None,
        batch_size: int = 4,
    ) -> None:
        if seq_len < 2 or batch_size < 1 or (limit is not None and limit < 1):
            raise ValueError("an evaluator needs seq_len >= 2, batch_size >= 1 and limit >= 1")
        self.text, self.seq_len, self.protocol = text, seq_len, protocol
        self.limit, self.batch_size = limit, batch_size
        self.label = label or text_name(text)
        self._cut: tuple[tuple[Any, ...], Tensor] | None = None

    def batches(self, student: Student) -> Iterator[Batch]:
        """The windows as batches on the student's device.

        Raises:
            ValueError: if a window is longer than the model's positions.
        """
        require_positions(self.label, self.seq_len, student)
        rows = self._windows(student.tokenizer)
        device = device_of(student.split)
        for start in tracked(range(0, len(rows), self.batch_size), self.label):
            ids = rows[start : start + self.batch_size].to(device)
            yield Batch(ids, ids)

    def _windows(self, tokenizer: Any) -> Tensor:
        """[N, seq_len], cut once for RTN and student, which share a tokenizer."""
        cut = (tokenizer, self.text, self.seq_len, self.protocol, self.limit)
        if self._cut is None or self._cut[0] != cut:
            rows = windows(self.text, tokenizer, self.seq_len, protocol=self.protocol, limit=self.limit)
            self._cut = (cut, rows)
        return self._cut[1]


def text_name(text: str | TextSource | list[str | TextSource]) -> str:
    """A short name for a text: the file's stem, or the corpus' own name."""
    first = text[0] if isinstance(text, list) else text
    path = first if isinstance(first, str) else first.path
    return path if ":" in path and not Path(path).exists() else Path(path).name.split(".")[0]


def require_positions(label: str, seq_len: int, student: Student) -> None:
    """
    Raises:
        ValueError: if `seq_len` tokens are more than the student's model has positions.
    """
    positions = getattr(student.model.config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise ValueError(f"evaluate {label}: seq_len {seq_len} exceeds the model's {positions} positions")


def tracked(steps: Sequence[T], label: str) -> Iterable[T]:
    """`steps` with a progress bar, where standard error is a terminal."""
    console = Console(stderr=True)
    return track(steps, f"evaluating on {label}", console=console, transient=True, disable=not console.is_terminal)


def answer_of(teacher: Teacher, batch: Batch) -> Outputs:
    """The teacher's answer, hidden states and a head.

    Raises:
        ValueError: from a teacher that cached less; its `judge()` answers any text.
    """
    answer = teacher.outputs(batch)
    if not isinstance(answer, Outputs):
        raise ValueError(f"an evaluator needs whole answers, {type(teacher).__name__} has less: give it judge()")
    return answer


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next(module.parameters()).device
