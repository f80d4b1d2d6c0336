"""Clipping searched on a grid: per scale, the shrunken range with the least weight error.

The classic start for learned scales (used by GPTQ's `mse` option, https://arxiv.org/abs/2210.17323, and LSQ+). A
small weight error is not a small model error: without training, per-channel W4 of SmolLM2 is *worse* after this
search than RTN (docs/log.md). With training it is the better start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.initializers.base import Initializer
from kdqat.quant.functional import choose_qparams, fake_quantize
from kdqat.quant.grouping import to_groups
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.types import BlockView, QParams


class MSEGrid(Initializer):
    """For every scale, try `num_steps` ranges from the full one down to `smallest` times it; keep the best.

    Args:
        num_steps: points on the grid.
        smallest: the last point, as a share of the full range.
        norm: p of the error sum |w - w_hat|^p; 2 is the MSE, GPTQ uses 2.4.

    Raises:
        ValueError: for a grid that is none.
    """

    def __init__(self, *, num_steps: int = 60, smallest: float = 0.4, norm: float = 2.0) -> None:
        if num_steps < 2 or not 0 < smallest < 1 or norm <= 0:
            raise ValueError("MSEGrid needs num_steps >= 2, 0 < smallest < 1 and norm > 0")
        self.num_steps, self.smallest, self.norm = num_steps, smallest, norm

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        for name, layer in block.layers.items():
            if layer.weight_fake_quantizer is not None:
                try:
                    layer.weight_fake_quantizer.load_qparams(self.search(layer.weight, layer.weight_fake_quantizer))
                except ValueError as error:
                    raise ValueError(f"layer {name}: {error}") from None

    def search(self, weight: Tensor, quantizer: FakeQuantizer) -> QParams:
        """The best scale and zero point for `weight` [O, I], of shape `spec.qparam_shape`."""
        spec, qmin, qmax = quantizer.spec, quantizer.qmin, quantizer.qmax
        groups = to_groups(weight.float(), spec)
        best: QParams | None = None
        best_error = None
        for shrink in torch.linspace(1.0, self.smallest, self.num_steps).tolist():
            trial = choose_qparams(groups, qmin, qmax, spec, shrink)
            trial = trial._replace(scale=trial.scale.to(getattr(torch, spec.scale_dtype)).float())
            error = (fake_quantize(groups, *trial, qmin, qmax) - groups).abs_().pow_(self.norm)
            error = error.sum((0, 1, 2)).reshape(1) if spec.granularity == "tensor" else error.sum(2, keepdim=True)
            if best is None or best_error is None:
                best, best_error = trial, error
                continue
            better = error < best_error
            best = QParams(*(torch.where(better, new, old) for new, old in zip(trial, best, strict=True)))
            best_error = torch.where(better, error, best_error)
        assert best is not None
        return best
