"""Gradient energies of layers from a probe's gradients, frozen layers included.

With D = dL/dy [n, O] and the input X [n, I] of a layer's matmul, its weight's gradient is D^T X [O, I], whoever trains
it. Its energy |D^T X|^2 is the sum over (D D^T) * (X X^T), two matrices [n, n]: for the few tokens of a probe a
fraction of the work and memory of D^T X itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.training.probe.capture import Seen
from kdqat.training.probe.stacks import Values, joined, stacked


def gradient_energies(loss: Tensor, scale: Tensor | float, seen: Seen, *, keep_graph: bool = False) -> Values:
    """activation_energy |dL/dy|^2 and weight_energy |D^T X|^2 of every layer in `seen.inputs`, of the loss `loss` /
    `scale`; touches no `.grad`.

    Args:
        loss: 0-D, of a pass that `watched(..., differentiable=True)` saw.
        scale: what the loss is divided by, after the backward pass.
        keep_graph: another loss of the same pass will follow.
    """
    names = list(seen.inputs)
    if not names:  # a plan of embeddings, experts or the head alone
        return _table([], loss.new_zeros(0), loss.new_zeros(0))
    gradients = torch.autograd.grad(
        loss, [seen.outputs[name] for name in names], retain_graph=keep_graph, allow_unused=True
    )
    with torch.no_grad(), torch.autocast(loss.device.type, enabled=False):
        found = {
            name: (gradient, seen.inputs[name])
            for name, gradient in zip(names, gradients, strict=True)
            if gradient is not None  # a layer that the loss does not see: BERT's pooler
        }
        parts = []
        for some, (d, x) in stacked(found):
            d = d / scale
            parts.append(_table(some, d.square().sum((1, 2)), _weight_energy(d, x)))
        return joined(parts)


def _table(names: list[str], activation_energy: Tensor, weight_energy: Tensor) -> Values:
    return {"activation_energy": (names, activation_energy), "weight_energy": (names, weight_energy)}


def _weight_energy(d: Tensor, x: Tensor) -> Tensor:
    """|D^T X|^2 of D [L, n, O] and X [L, n, I]: [L]."""
    if d.shape[1] <= min(d.shape[2], x.shape[2]):
        return ((d @ d.mT) * (x @ x.mT)).sum((1, 2)).clamp(min=0)
    return torch.stack([(one.mT @ other).square().sum() for one, other in zip(d, x, strict=True)])
