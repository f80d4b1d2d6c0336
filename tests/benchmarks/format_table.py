"""Every preset on SmolLM2-135M without training: perplexity and KL to the teacher, RTN and the searches of LLM-FP4.

    python tests/benchmarks/format_table.py MODEL.gguf DATA_DIR OUT_DIR WINDOWS [NAME ...]

WINDOWS is how many of each text are evaluated (0: all). NAME is a preset or one of the rows of FPQ below; default: all.
Rows append to OUT_DIR/formats.jsonl; presets that do not fit the model's widths are printed with the reason. Activation
ranges are calibrated on training rows of C4.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from kdqat.initializers import FPQ, RTN
from kdqat.spec import PRESETS, LayerScheme, QuantSpec
from tests.benchmarks.untrained import Untrained, append

STATIC_INT4 = LayerScheme(weight=QuantSpec(format="int4"), activation=QuantSpec(format="int4", granularity="tensor"))
FPQ_ROWS: dict[str, tuple[Any, Any]] = {
    "int4-minmax": (STATIC_INT4, RTN()),
    "fp4-minmax": ("FP4_W4A4", RTN()),
    "fp4-search": ("FP4_W4A4", FPQ()),
    "fp4-search-bias": ("FP4_W4A4", FPQ(search="bias")),
    "fp4-pre-shift-minmax": ("FP4_W4A4_PRE_SHIFT", RTN()),
    "fp4-pre-shift": ("FP4_W4A4_PRE_SHIFT", FPQ()),
    "fp4-pre-shift-bias": ("FP4_W4A4_PRE_SHIFT", FPQ(search="bias")),
    "fp4-pre-shift-checked": ("FP4_W4A4_PRE_SHIFT", FPQ(mode="range_checked")),
    "fp4-w4a8-minmax": ("FP4_W4A8", RTN()),
    "fp4-w4a8-search": ("FP4_W4A8", FPQ()),
    "fp8-w8a8-minmax": ("FP8_W8A8", RTN()),
    "fp8-w8a8-search": ("FP8_W8A8", FPQ()),
    "fp4-w4a16-search": ("FP4_E2M1", FPQ()),
}


def main(path: str, data_dir: str, out_dir: str, num_windows: str, *names: str) -> None:
    table = Untrained(path, data_dir, windows=int(num_windows))
    for name in names or (*FPQ_ROWS, *PRESETS):
        scheme, initializer = FPQ_ROWS.get(name, (name, RTN()))
        try:
            student, prepare_s = table.prepare(scheme, initializer)
        except ValueError as error:
            print(f"{name:24s} does not fit: {error}", flush=True)
            continue
        started = time.monotonic()
        numbers = table.evaluate(student)
        evaluate_s = time.monotonic() - started
        bits = student.summary()["average_bits"]
        chosen = sorted({s.weight.format for s in student.plan.values() if s.weight})
        row = {"name": name, "bits": bits, "formats": chosen, "prepare_s": prepare_s, "numbers": numbers}
        append(row, Path(out_dir) / "formats.jsonl")
        text = "  ".join(f"{k} ppl {v['perplexity']:.2f} KL {v['kl_mean']:.3f}" for k, v in numbers.items())
        print(f"{name:24s} {bits:6.3f} bits  {text}  {prepare_s:.0f} + {evaluate_s:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
