"""Which preset goes losslessly into which format, by asking every exporter: the table of docs/serving.md.

    python tests/benchmarks/export_table.py

A star says that the plan's activations are left to the engine, or that it takes their ranges by its own rule. The
model is a Llama of width 256, which every preset's groups divide; widths that do not fit are refused case by case.
"""

from __future__ import annotations

import re
from typing import Any

from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration
from kdqat.exporters.words import exporter_of, format_words, words_that_hold
from kdqat.initializers import RTN
from kdqat.models import ModelSource, SplitModel
from kdqat.quant import LSQ
from kdqat.spec import PRESETS
from kdqat.student import Student, prepare_student


def wide_student(scheme: str) -> Student:
    """A one-block student whose every width is a multiple of 256."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("llama", **sizes, **heads, **ids, vocab_size=260, max_position_embeddings=64)
    split = SplitModel(AutoModelForCausalLM.from_config(config).eval())
    text = Calibration("kdqat:prose", seq_len=32, num_rows=2)
    return prepare_student(ModelSource("toy:llama"), Uniform(scheme), LSQ, RTN(), calibration=text, split=split)


def table() -> str:
    """Markdown; presets that go into the same formats share a row, without the formats that hold every preset."""
    rows: dict[tuple[str, ...], list[str]] = {}
    everywhere = set(format_words())
    held: dict[str, tuple[str, ...]] = {}
    for name in PRESETS:
        student = wide_student(name)
        holding = words_that_hold(student)
        everywhere &= set(holding)
        held[name] = tuple(f"`{w}`{'*' if exporter_of(w).leaves(student.plan) else ''}" for w in holding)
    for name, words in held.items():
        own = tuple(word for word in words if word.strip("`*") not in everywhere)
        rows.setdefault(own, []).append(name)
    lines = ["| preset | formats that hold it losslessly |", "| --- | --- |"]
    for own, names in sorted(rows.items(), key=lambda row: -len(row[0])):
        lines.append(f"| {folded(names)} | {', '.join(own) or 'none'} |")
    shared = ", ".join(f"`{word}`" for word in format_words() if word in everywhere)
    return "\n".join([*lines, f"| every preset | {shared} |"])


def folded(names: list[str]) -> str:
    """Presets that differ in group size only are written once: `W4A16`, `_G32`, `_G64`."""
    families: dict[str, list[str]] = {}
    for name in names:
        stem, group = re.fullmatch(r"(.*?)(_G\d+)?", name).groups()  # type: ignore[union-attr]
        families.setdefault(stem, []).append(group or "")
    words = []
    for stem, (first, *others) in families.items():
        words += [f"`{stem}{first}`", *(f"`{group}`" for group in others)]
    return ", ".join(words)


if __name__ == "__main__":
    print(table())
