"""The model from a block on: what comes before is not computed, and the model is whole again afterwards."""

from __future__ import annotations

import pytest
import torch

from kdqat.importance.tail import Tail
from kdqat.models import blocks_of
from tests.calibrate.toy import split_model, text


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "opt", "phi", "mixtral"])
def test_from_its_own_states_the_answer_is_the_whole_models_and_other_states_change_it(kind):
    split, batch = split_model(kind), text()
    states: list[torch.Tensor] = []
    for block in blocks_of(split.model):
        block.register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    tail = Tail(split)
    whole = tail.whole(batch)
    before = list(states)  # what follows is heard too
    for index, hidden in enumerate(before):
        torch.testing.assert_close(tail.from_block(index, hidden, batch), whole)
    assert not torch.allclose(tail.from_block(1, before[1].roll(1, 1), batch), whole)
    assert not torch.allclose(tail.from_block(len(before), before[0], batch), whole)
    torch.testing.assert_close(tail.whole(batch), whole)
    assert not any("forward" in vars(module) for module in split.modules())
