"""What all observers cost: the mean step with and without them, in one process.

    python tests/benchmarks/observer_cost.py [key=value ...]

Keys: shape (smollm2, 1b, 7b, tiny), batch, seq, every (20), cycles (3: how many times `every` steps are timed), compile
(0, 1), checkpoint (0, 1, selective), which (all, or gradient, signal, oscillation, one of them).

Three runs of the same steps: without, with, without. The first `every` steps of each are warm-up, which holds the
observers' first look as well; each later observed step is in the mean with its cycle. Prints the ratio of the means,
and beside it the ratio within the run that has observers: its mean step over the median of its unobserved steps.

That is 3 * (every * (cycles + 1) + 1) steps, 243 by default. cycles=1 takes half of them and asks the same, of one
observed step; batch, seq and every change what is asked.
"""

from __future__ import annotations

import gc
import statistics
import sys
from functools import partial
from typing import Any

import torch
from step_clock import Clock
from step_time import SHAPES, Rows, llama, make_teacher, own_device

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.callbacks import GradientLog, OscillationLog, SignalLog
from kdqat.initializers import RTN
from kdqat.losses import ForwardKL
from kdqat.models import ModelSource, SplitModel
from kdqat.quant import LSQ
from kdqat.student import prepare_student
from kdqat.training import KDQATModule, Parallel

OBSERVERS: dict[str, Any] = {
    "gradient": lambda every: GradientLog(every_n_steps=every, probe_every_n_steps=every),
    "signal": lambda every: SignalLog(every_n_steps=every),
    "oscillation": lambda every: OscillationLog(every_n_steps=every),
}


def main(*pairs: str) -> None:
    args = dict(pair.split("=") for pair in pairs)
    every, which = int(args.get("every", 20)), args.get("which", "all")
    chosen = list(OBSERVERS) if which == "all" else [which]
    runs = [timed(args, every, names) for names in ([], chosen, [])]
    without, observed = runs[0] + runs[2], runs[1]
    quiet = [ms for number, ms in enumerate(observed) if number % every not in (0, every - 1)]
    means = [statistics.fmean(run) for run in runs]
    print(f"{' '.join(pairs)}: {' + '.join(chosen)} at every {every} steps")
    print(f"without {means[0]:.2f} and {means[2]:.2f} ms a step, with {means[1]:.2f} ms")
    print(
        f"an observed step: {statistics.fmean(observed[::every]):.1f} ms, the others {statistics.median(quiet):.2f} ms"
    )
    print(f"ratio {means[1] / statistics.fmean(without):.4f}; within the run {means[1] / statistics.median(quiet):.4f}")


def timed(args: dict[str, str], every: int, names: list[str]) -> list[float]:
    """Milliseconds of each step after the warm-up, the first of them an observed one."""
    shape, cycles = args.get("shape", "smollm2"), int(args.get("cycles", 3))
    split, source = SplitModel(llama(shape)), ModelSource("random")
    teacher = make_teacher("live")
    assert teacher is not None
    with own_device():
        teacher.prepare(source, split, None, pristine=True)
    plan = Uniform(args.get("scheme", "W4A16"))
    student = prepare_student(source, plan, LSQ, RTN(), split=split, tokenizer=object())
    checkpoint: Any = {"0": False, "1": True}.get(args.get("checkpoint", "0"), args.get("checkpoint"))
    module = KDQATModule.from_student(
        student, plan=plan, quantizer=LSQ, loss=ForwardKL(), teacher=teacher,
        optimizer=partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0),
        parallel=Parallel(compile_blocks=args.get("compile") == "1", checkpoint_blocks=checkpoint),
    )  # fmt: skip
    rows = Rows({**args, "steps": str(every * (cycles + 1) + 1)}, SHAPES[shape][5])
    clock = Clock(None)
    trainer_args = {"max_steps": len(rows), "accelerator": "auto", "devices": 1, "precision": "bf16-mixed",
                    "enable_progress_bar": False, "log_every_n_steps": 10}  # fmt: skip
    api.make_trainer(trainer_args, None, [clock, *(OBSERVERS[name](every) for name in names)]).fit(module, rows)
    milliseconds = clock.milliseconds(warmup=0)[every : every * (cycles + 1)]
    del module, student, split, teacher
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return milliseconds


if __name__ == "__main__":
    main(*sys.argv[1:])
