"""What the machine has: free memory, and what it reaches on matmuls and on memory traffic, measured in a moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

PROBE_SECONDS = 0.2
GIB = 2**30
CUDA_CONTEXT = round(0.5 * GIB)  # driver, kernels, NCCL excluded; outside of what torch counts
CUDA_WORKSPACE = 64 * 2**20  # cuBLAS
CPU_PROCESS = round(0.3 * GIB)  # what libraries still load
FRAGMENTATION = 0.03  # of what is allocated


@dataclass(frozen=True)
class Speed:
    """What a probe reached."""

    flops: float  # a second, in matmuls of the dtype asked for
    traffic: float  # bytes a second, read and written


def has(device: str) -> bool:
    """Whether this machine has the kind of device."""
    return device == "cpu" or torch.cuda.is_available()


def available_bytes(device: str, processes: int) -> int | None:
    """Free memory for each of `processes` on this machine; None if the device is not here."""
    if not has(device):
        return None
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]  # of this process's own: asking another leaves a context there
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // processes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def probe(device: str, dtype: torch.dtype) -> Speed:
    """Run a matmul and an addition for a moment each."""
    size, elements = (4096, 2**25) if device == "cuda" else (512, 2**23)
    a = torch.ones((size, size), device=device, dtype=dtype)
    x = torch.ones(elements, device=device)
    y = torch.empty_like(x)
    matmuls = _rate(lambda: a @ a, device)
    additions = _rate(lambda: torch.add(x, 1.0, out=y), device)
    return Speed(matmuls * 2 * size**3, additions * 2 * x.numel() * x.element_size())


def _rate(run: Callable[[], object], device: str) -> float:
    """Calls a second."""
    for _ in range(3):
        run()
    calls, started = 0, _clock(device)
    while (spent := _clock(device) - started) < PROBE_SECONDS / 2:
        for _ in range(4):
            run()
        calls += 4
    return calls / spent


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
