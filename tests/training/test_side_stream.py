"""The teacher's own CUDA stream changes no number; what is handed over is found in any nesting."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kdqat.models import FrozenTeacher
from kdqat.training import Parallel
from kdqat.training.side_stream import SideStream, tensors_in
from kdqat.types import Outputs
from tests.training.toy import batch, make_module, train


def test_tensors_are_found_in_outputs_and_batches(monkeypatch):
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert [t.numel() for t in tensors_in((Outputs(a, lambda h: h, {"hidden_states": (b, c)}), None, b"key"))] == [
        1,
        2,
        3,
    ]


def test_on_a_cpu_there_is_none():
    module = make_module()
    train(module, [batch(2)])
    assert module._side is None


@pytest.mark.gpu
@pytest.mark.parametrize("parallel", [Parallel(), Parallel(compile_blocks=True)], ids=["eager", "compiled"])
def test_losses_and_weights_are_the_same_with_and_without_it(parallel, monkeypatch):
    found, joined = [], []
    join = SideStream.join
    monkeypatch.setattr(SideStream, "join", lambda side, *values: joined.append(side) or join(side, *values))
    for beside in (True, False):
        module = make_module(
            parallel=parallel, teacher=FrozenTeacher(dtype="float32"), optimizer=partial(torch.optim.SGD, lr=0.5)
        )
        if not beside:
            monkeypatch.setattr("kdqat.training.module.SideStream", lambda device: None)
        train(module, [batch(4, 64, seed=i) for i in range(12)], accelerator="gpu", devices=1)
        assert len(joined) == 2 * 12  # a batch and an answer each step, once
        found.append(module.split.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
