"""Gradient clipping that knows fused optimizers and sharded gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


def clip_gradients(optimizer: Optimizer, value: float | None, algorithm: str | None, precision: str) -> Tensor | None:
    """Clip what `optimizer` trains, by `algorithm` "norm" or "value"; returns the norm it was clipped by, if any.

    Raises:
        ValueError: for fp16 autocast with a fused optimizer, whose gradients still have the loss scale in them.
    """
    # Lightning's own refuses fused optimizers under autocast, for the sake of fp16 loss scaling
    if not value:
        return None
    if precision == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError("trainer.gradient_clip_val with precision 16-mixed needs an optimizer without fused: true")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(parameters, value)
        return None
    norm = torch.nn.utils.clip_grad_norm_(parameters, value)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2
