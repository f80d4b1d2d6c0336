"""Energies (squared norms) of the gradients that training made, and what two batch sizes say about their noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from kdqat.training.step import summed_over_ranks
from kdqat.types import LayerRef


def weight_energies(
    refs: Sequence[LayerRef], layers: Mapping[str, Any], world_size: int
) -> tuple[list[LayerRef], Tensor]:
    """Those of `refs` whose weight has a gradient, and its squared norm, fp64 [L]; reads each gradient once.

    Args:
        world_size: ranks among which FSDP2 has cut the gradients; 1: they are whole.
    """
    found = [ref for ref in refs if layers[ref.name].weight.grad is not None]
    if not found:
        device = layers[refs[0].name].weight.device if refs else None
        return [], torch.zeros(0, dtype=torch.float64, device=device)
    gradients = [layers[ref.name].weight.grad for ref in found]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    energies = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float32)).double().square()
    return found, summed_over_ranks(energies, world_size)


def signal_to_noise(small: Tensor, small_num: Tensor, large: Tensor, large_num: Tensor) -> Tensor:
    """Energy of the true gradient over that of the noise which a step of `large_num` tokens leaves in it.

    The energy of a mean over n tokens is |G|^2 + S / n on average; two n give both unknowns (McCandlish et al. 2018,
    https://arxiv.org/abs/1812.06162, appendix A). A single estimate is noisy, and may be negative.

    Args:
        small, large: energies of mean gradients [L].
        small_num, large_num: over how many tokens.
    """
    signal = (large_num * large - small_num * small) / (large_num - small_num)
    noise = (small - large) / (1 / small_num - 1 / large_num)
    return signal * large_num / noise


def loss_scale(trainer: L.Trainer) -> Tensor | float:
    """What fp16 autocast has multiplied the loss with; 1 otherwise. Does not wait for the device."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    scale = None if scaler is None else scaler._scale
    return 1.0 if scale is None else scale.double()
