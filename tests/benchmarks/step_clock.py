"""When steps begin, and what the device waits for in between: what `step_time.py` measures with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch


class Clock(L.Callback):
    """Time between the beginnings of steps, by CUDA events (CPU: by the clock)."""

    def __init__(self, profile: Path | None) -> None:
        self.events: list[Any] = []
        self.profile, self.profiler = profile, None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
        else:
            self.events.append(time.perf_counter())
        if self.profile and trainer.global_step == 9:
            self.profiler = torch.profiler.profile()
            self.profiler.__enter__()
        if self.profiler and trainer.global_step == 11:
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            table = self.profiler.key_averages()
            text = table.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
            assert self.profile is not None
            self.profile.write_text(f"{idle(self.profiler)}\n{text}")
            self.profiler = None

    def milliseconds(self, warmup: int = 5) -> list[float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            steps = [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False)]
        else:
            steps = [1000 * (b - a) for a, b in zip(self.events, self.events[1:], strict=False)]
        return steps[min(warmup, len(steps) // 2) :]


def idle(profiler: Any) -> str:
    """Where the device waited for the CPU: its longest gaps, and what it did before and after."""
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA and "#" not in e.name]
    kernels.sort(key=lambda e: e.time_range.start)
    gaps, end, last = [], kernels[0].time_range.end, kernels[0].name
    for event in kernels[1:]:
        if event.time_range.start > end:
            gaps.append((event.time_range.start - end, last, event.name))
        if event.time_range.end > end:
            end, last = event.time_range.end, event.name
    lines = [f"{gap:8.0f} us between {a[:60]} and {b[:60]}" for gap, a, b in sorted(gaps, reverse=True)[:12]]
    total = sum(gap for gap, _, _ in gaps) / 1000
    span = (end - kernels[0].time_range.start) / 1000
    return "\n".join([f"two steps: {span:.1f} ms, of which idle {total:.1f} ms in {len(gaps)} gaps", *lines])
