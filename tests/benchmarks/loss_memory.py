"""Time, memory and exactness of the distillation loss on a large vocabulary: five ways to the same number.

    python tests/benchmarks/loss_memory.py                         Llama 3.2 1B's head, 16k tokens: one large GPU
    python tests/benchmarks/loss_memory.py --tokens 512 --vocab 4096 --hidden 256 --chunk 128

    plain       all logits at once
    recomputed  chunk by chunk under activation checkpointing, as for a head that is more than one matmul
    projected   the gradient made with the chunk's logits, eager
    compiled    the same, fused by torch.compile
    kernel      the same, by the kernel that knows this loss (a head with a transform keeps the others from it)

Each runs forward KL forward and backward under 16-bit autocast, from an fp32 weight and a teacher in 16 bits. "peak" is
what it allocates beyond what was there before; "beside" is that without the fp32 gradient of the head, which every way
leaves behind. Errors are relative in norm to the fp32 gradients; those of the 16-bit logits are in all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdqat.losses import ForwardKL
from kdqat.models.split import transform_logits
from kdqat.types import Batch, Outputs, Projection

WAYS = ("plain", "recomputed", "projected", "compiled", "kernel")
GIB = 2**30


class Problem:
    """A student's hidden states and head, a teacher near them, and a batch whose tokens all count."""

    def __init__(self, tokens: int, vocab: int, hidden: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(1, tokens + 1, hidden, device=device).requires_grad_()
        self.weight = (torch.randn(vocab, hidden, device=device) * 3 / hidden**0.5).requires_grad_()
        near = (self.weight.detach() * 0.9 + 0.3 / hidden**0.5 * torch.randn_like(self.weight)).to(dtype)
        self.teacher = Outputs(self.hidden.detach().to(dtype), partial(F.linear, weight=near), {})
        ids = torch.randint(vocab, (1, tokens + 1), device=device)
        self.batch, self.device, self.dtype = Batch(ids, ids), device, dtype

    def run(self, way: str, loss: ForwardKL) -> Tensor:
        """The loss, after its backward pass."""
        self.hidden.grad = self.weight.grad = None
        with torch.autocast(self.device, self.dtype):
            total = loss(self.student(way), self.teacher, self.batch).sum
        total.backward()
        return total.detach()

    def student(self, way: str) -> Outputs:
        transform: Any = partial(transform_logits, scale=1.0, soft_cap=None, vocab_size=None)
        transform = None if way == "kernel" else transform
        projection = None if way in ("plain", "recomputed") else lambda: Projection(self.weight, None, transform)
        return Outputs(self.hidden, lambda rows: F.linear(rows, self.weight), {}, projection)

    def exact(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradients in fp32 of the same teacher; a few rows at a time, each with its backward pass."""
        self.hidden.grad = self.weight.grad = None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for ours, theirs in zip(
            self.hidden[0, :-1].split(chunk), self.teacher.hidden[0, :-1].split(chunk), strict=True
        ):
            teacher_logits = self.teacher.head(theirs)
            part = ForwardKL().token_loss(ours @ self.weight.T, teacher_logits, self.batch.labels[0]).sum()
            part.backward()
            total += part.detach()
        assert self.hidden.grad is not None and self.weight.grad is not None
        return total, self.hidden.grad, self.weight.grad


@contextmanager
def peak_of(device: str) -> Iterator[Callable[[], int]]:
    """Counts the bytes allocated above those at its beginning; what it gives tells the most there were, afterwards."""
    peak = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: peak
        peak = torch.cuda.max_memory_allocated() - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield lambda: peak
    held = 0
    assert profile.profiler is not None
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)


def measure(problem: Problem, way: str, chunk: int, repeats: int) -> tuple[float, int, Tensor]:
    """(milliseconds, peak bytes, loss) of `way`; its gradients are left in `problem`."""
    loss = ForwardKL(chunk_tokens=problem.batch.labels.numel() if way == "plain" else chunk)
    if way == "compiled":
        loss.compile_chunks()
    problem.run(way, loss)  # compiles, and lets libraries take their workspace
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        value = problem.run(way, loss)
        float(value)
        if problem.device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    problem.hidden.grad = problem.weight.grad = None
    with peak_of(problem.device) as peak:
        value = problem.run(way, loss)
    return statistics.median(times), peak(), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 16384), ("vocab", 128256), ("hidden", 2048), ("chunk", 1024), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    problem = Problem(args.tokens, args.vocab, args.hidden, getattr(torch, args.dtype), args.device)
    exact = problem.exact(args.chunk)
    own = problem.weight.numel() * 4
    print(
        f"{args.device}, {args.dtype}, {args.tokens} tokens in chunks of {args.chunk}, V {args.vocab}, H {args.hidden}"
    )
    print(f"{'way':<11} {'ms':>9} {'peak GiB':>9} {'beside':>9} {'loss err':>9} {'d_hidden':>9} {'d_weight':>9}")
    for way in args.ways:
        try:
            elapsed, peak, value = measure(problem, way, args.chunk, args.repeats)
        except torch.OutOfMemoryError:
            print(f"{way:<11} out of memory")
            torch.cuda.empty_cache()
            continue
        results = (value, problem.hidden.grad, problem.weight.grad)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]
        sizes = f"{peak / GIB:9.3f} {(peak - own) / GIB:9.3f}"
        print(f"{way:<11} {elapsed:9.1f} {sizes} {errors[0]:9.1e} {errors[1]:9.1e} {errors[2]:9.1e}", flush=True)


if __name__ == "__main__":
    main()
