"""SignRound, the method of AutoRound (https://arxiv.org/abs/2309.05516): rounding and ranges learned block by block.

Signed gradient descent on the squared error of a block's output: what the block gives on the quantized stream, against
what the full-precision model gives there, so that a block also makes good what the blocks before it lost. The rate
falls from 1 / num_steps to 0, so that an offset travels half a step of the grid at most.

Of the start (RTN), the step of least loss and the last one, those are kept that have the least error on all the
calibration text. The latent weight becomes what its codes mean (`rewrite.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from kdqat.calibrate import BlockCall, calibrating
from kdqat.initializers.base import Initializer
from kdqat.initializers.rewrite import naming, quantized_layers, round_to_nearest, write_values
from kdqat.initializers.rounding_learner import RoundingLearner
from kdqat.quant import QuantizedLayer
from kdqat.types import BlockView

Learners = Mapping[str, RoundingLearner]
State = dict[str, tuple[Tensor, Tensor]]


class SignRound(Initializer):
    """Codes and scales of least block output error. Layers outside the blocks round to nearest, with a warning.

    Args:
        num_steps: of descent for each block; a step sees one micro-batch of the calibration text.
        lr: rate of the first step; None: 1 / num_steps.
        seed: of the order in which micro-batches come.

    Raises:
        ValueError: for numbers that make no descent.
    """

    needs_calibration: ClassVar[bool] = True
    sequential = True
    rewrites_weights = True

    def __init__(self, *, num_steps: int = 200, lr: float | None = None, seed: int = 0) -> None:
        if num_steps < 1 or (lr is not None and lr <= 0):
            raise ValueError("SignRound needs num_steps >= 1 and lr > 0")
        self.num_steps, self.seed = num_steps, seed
        self.lr = 1 / num_steps if lr is None else lr
        self._next: int | None = None  # the block whose full-precision inputs are kept
        self._originals: list[Tensor] = []

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        layers = quantized_layers(block.layers)
        if block.index is None:
            self._originals = []
            round_to_nearest(layers, method="SignRound", reason="outside the blocks there is no block output")
            return
        call: BlockCall = block.call
        targets = self._targets(block.index, call)
        if not layers:
            return
        learners = {}
        for name, layer in layers.items():
            with naming(name):
                assert layer.weight_fake_quantizer is not None
                learners[name] = RoundingLearner(layer.weight_fake_quantizer, layer.as_matrix(layer.weight))
        with _standing_in(layers, learners), calibrating(call.module, sequential=True):
            self._learn(learners, call, targets)
        for name, learner in learners.items():
            layer, qparams = layers[name], learner.qparams()
            matrix = layer.as_matrix(layer.weight)
            with naming(name):
                values = learner.values(qparams).reshape(matrix.shape)
                write_values(layer, values, qparams, learner.quantizer.second_level(matrix))

    def _targets(self, index: int, call: BlockCall) -> list[Tensor]:
        """What the block gives in the full-precision model, which is what the next block gets there."""
        kept = self._next == index and len(self._originals) == len(call.inputs)
        originals = self._originals if kept else call.inputs
        with calibrating(call.module, sequential=False):
            targets = [call.replay(i, hidden).to(hidden.device) for i, hidden in enumerate(originals)]
        self._next, self._originals = index + 1, targets
        return targets

    def _learn(self, learners: Learners, call: BlockCall, targets: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        start = [self._loss(call, i, targets[i]) for i in range(len(targets))]
        best, least = _state(learners), float("inf")
        order: list[int] = []
        for step in range(self.num_steps):
            order = order or torch.randperm(len(targets), generator=generator).tolist()
            i = order.pop()
            with torch.enable_grad():
                loss = self._loss(call, i, targets[i])
                parameters = [parameter for learner in learners.values() for parameter in learner.learned()]
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            share = float(loss) / max(float(start[i]), torch.finfo(torch.float32).tiny)  # micro-batches differ
            if share < least:
                best, least = _state(learners), share
            rate = self.lr * (1 - step / self.num_steps)
            for n, learner in enumerate(learners.values()):
                learner.step(rate, (gradients[2 * n], gradients[2 * n + 1]))
        untouched = {name: (torch.zeros_like(v), torch.ones_like(s)) for name, (v, s) in best.items()}
        candidates = [(float(sum(start)), untouched)]
        for state in (_state(learners), best):
            _load(learners, state)
            candidates.append((float(sum(self._loss(call, i, target) for i, target in enumerate(targets))), state))
        _load(learners, min(candidates, key=lambda candidate: candidate[0])[1])

    def _loss(self, call: BlockCall, i: int, target: Tensor) -> Tensor:
        """Squared error of a micro-batch's tokens, padding aside, 0-D."""
        output = call.replay(i)
        return (call.tokens(i, output).float() - call.tokens(i, target.to(output.device)).float()).square().mean()


@contextmanager
def _standing_in(layers: Mapping[str, QuantizedLayer], learners: Learners) -> Iterator[None]:
    """The learners in the place of the layers' weight quantizers."""
    try:
        for name, learner in learners.items():
            layers[name].replace_quantizers(weight=learner)  # type: ignore[arg-type]
        yield
    finally:
        for name, learner in learners.items():
            layers[name].replace_quantizers(weight=learner.quantizer)


def _state(learners: Learners) -> State:
    """A copy of what has been learned."""
    return {name: (learner.offset.clone(), learner.shares.clone()) for name, learner in learners.items()}


def _load(learners: Learners, state: State) -> None:
    for name, learner in learners.items():
        for parameter, value in zip(learner.learned(), state[name], strict=True):
            parameter.copy_(value)
