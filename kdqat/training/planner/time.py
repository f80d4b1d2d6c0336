"""How long a step takes: matmul FLOPs and memory traffic counted from shapes, over what the device reaches.

FLOPs    6 N a token for the student (2 forward, 4 backward), 2 N for a live teacher, attention beside it, and 2 N
         more where blocks are recomputed
traffic  every tensor that an eager forward pass makes is written once and read once; backward does it twice again;
             the loss with its gradient is counted the same way, once
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdqat.training.planner.hardware import Speed
from kdqat.training.planner.teacher import TeacherCost
from kdqat.training.planner.trace import Rows

# (device, compiled): share of the probed matmul rate; eager traffic, as a multiple of its time at the probed rate (CPU
# kernels that round, cast or take exponentials are slower than an addition; compiling fuses). Adjust here.
EFFICIENCY: dict[tuple[str, bool], tuple[float, float]] = {
    ("cuda", False): (0.7, 1.0),
    ("cuda", True): (0.75, 0.35),
    ("cpu", False): (0.7, 2.0),
    ("cpu", True): (0.7, 1.0),
}


@dataclass(frozen=True)
class StepWork:
    """Of one optimizer step on one device."""

    flops: float
    traffic: float


def step_work(
    config: Any, matmuls: tuple[int, int], teacher: TeacherCost, rows: Rows, *, made: int, loss_made: int, state: int,
    recompute: bool, accumulate: int,
) -> StepWork:  # fmt: skip
    """
    Args:
        config: the student's, for the shape of attention.
        matmuls: weights a token meets (inside blocks, head).
        made: bytes that an eager forward pass of the student makes.
        loss_made: bytes that the loss and its gradient make.
        state: bytes of weights, gradients and optimizer state.
        recompute: blocks run forward twice.
        accumulate: micro-batches a step.
    """
    tokens = rows.batch_size * rows.seq_len
    inside, head = matmuls
    attention = _attention(config, rows)
    student = 6 * (inside + head) * tokens + 3 * attention
    student += (2 * inside * tokens + attention) if recompute else 0
    live = 2 * (teacher.inside + teacher.head) * tokens + (attention if teacher.inside else 0)
    teacher_made = made / 2 if teacher.inside else 0  # in half the width
    traffic = 2 * (3 * made + teacher_made + loss_made + (made if recompute else 0))
    return StepWork(accumulate * (student + live), accumulate * traffic + 2 * state)


def seconds(work: StepWork, speed: Speed, *, device: str, compiled: bool) -> float:
    """Of one optimizer step."""
    reached, left = EFFICIENCY[device, compiled]
    return work.flops / (reached * speed.flops) + left * work.traffic / speed.traffic


def _attention(config: Any, rows: Rows) -> float:
    """Forward FLOPs of causal attention: two products of [T, T/2] in every head."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    share = 1.0 if rows.segments or rows.padding else 0.5  # with a mask nothing is skipped
    return 4 * share * rows.batch_size * rows.seq_len**2 * width * config.num_hidden_layers
