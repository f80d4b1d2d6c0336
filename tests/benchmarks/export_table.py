"""Which preset goes losslessly into which format, by asking every exporter: the table of docs/serving.md.

    python tests/benchmarks/export_table.py

The model is a Llama of width 256, which every preset's groups divide; widths that do not fit are refused case by case.
"""

from __future__ import annotations

from typing import Any

from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration
from kdqat.exporters.words import words_that_hold
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
    """Markdown; presets that go into the same formats share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in PRESETS:
        rows.setdefault(tuple(words_that_hold(wide_student(name))), []).append(name)
    lines = ["| preset | formats that hold it losslessly |", "| --- | --- |"]
    for words, names in sorted(rows.items(), key=lambda row: -len(row[0])):
        lines.append(f"| {', '.join(f'`{n}`' for n in names)} | {', '.join(f'`{w}`' for w in words) or 'none'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
