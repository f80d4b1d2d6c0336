"""Formats by the words of the command line: `gguf:q4_0`, `compressed-tensors`, `dequantized:bfloat16`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial

from kdqat import exporters
from kdqat.exporters.base import Exporter
from kdqat.student import Student


def format_words() -> dict[str, Callable[[], Exporter]]:
    """Word -> what makes that exporter, of every exporter that `kdqat.exporters` names."""
    found: dict[str, Callable[[], Exporter]] = {}
    for name in exporters.__all__:
        cls = getattr(exporters, name)
        if not inspect.isclass(cls) or not issubclass(cls, Exporter) or inspect.isabstract(cls):
            continue
        for word, arguments in (cls.words or {str(cls.name): {}}).items():
            found[word] = partial(cls, **arguments)
    return found


def exporter_of(word: str) -> Exporter:
    """The exporter that `word` stands for, in capitals or not.

    Raises:
        ValueError: for an unknown word, naming the nearest, or all of its family ("gguf").
    """
    words, asked = format_words(), word.lower()
    if asked in words:
        return words[asked]()
    kinds = [known for known in words if known.startswith(f"{asked}:")]
    close = difflib.get_close_matches(asked, words, n=1)
    if close and not kinds:
        raise ValueError(f"--format {word!r} is unknown; did you mean {close[0]!r}?")
    raise ValueError(f"--format {word!r} is unknown; use one of {', '.join(kinds or words)}")


def words_that_hold(student: Student) -> list[str]:
    """The formats that refuse nothing of the student's plan."""
    return [word for word, make in format_words().items() if make().refuses(student) is None]
