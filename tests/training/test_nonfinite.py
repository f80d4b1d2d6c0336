"""A loss that is no number any more is said with step, layer and scales."""

from __future__ import annotations

import pytest
import torch

from kdqat.training import NonFiniteLossError
from kdqat.training.nonfinite import explain
from kdqat.types import TopKOutputs
from tests.training.toy import batch, make_module, train

LAYER = "model.layers.1.mlp.up_proj"


def test_the_first_layer_that_broke_is_named_with_its_scales() -> None:
    module = make_module()
    layer = module.build().layers[LAYER]
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError) as caught:
        train(module, [batch(2)])
    message = str(caught.value)
    assert message.startswith(f"step 0: the loss is nan; first at layer {LAYER} (scales ")
    assert "1 non-finite weights" in message and "lower the learning rate" in message


def test_a_broken_scale_is_named_by_its_layer() -> None:
    module = make_module()
    quantizer = module.build().layers[LAYER].weight_fake_quantizer
    assert quantizer is not None
    with torch.no_grad():
        quantizer.scale[3] = torch.nan  # an infinite one is stored as the largest number there is
    with pytest.raises(NonFiniteLossError, match=f"first at layer {LAYER} .*to nan, 0 non-finite weights"):
        train(module, [batch(2)])


def test_a_norm_that_broke_is_named() -> None:
    module = make_module()
    with torch.no_grad():
        module.build().model.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"first at layer model\.norm;"):
        train(module, [batch(2)])


def test_a_teacher_that_broke_is_told_from_the_student() -> None:
    module = make_module()
    module.build()
    with torch.no_grad():
        module.teacher.split.model.model.norm.weight[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(NonFiniteLossError, match=r"the teacher's hidden states are not finite: load it in float32"):
        train(module, [batch(2)])


def test_weights_are_as_before_the_step_that_broke() -> None:
    module = make_module()
    layer = module.build().layers[LAYER]
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    before = {name: value.clone() for name, value in module.build().split.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="step 0"):
        train(module, [batch(2), batch(2, seed=1)], accumulate_grad_batches=2)
    for name, value in module.build().split.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)


def test_a_cached_teacher_whose_answers_broke_is_told_from_the_student() -> None:
    data = batch(1, tokens=4)
    split, k = make_module().build().split, 3
    for broken in ("log_probs", "log_tail"):
        answer = TopKOutputs(torch.zeros(1, 4, k).long(), torch.zeros(1, 4, k), torch.full((1, 4), -torch.inf), {})
        assert "no single layer" in explain(7, torch.nan, split, answer, data)  # a tail of nothing is no mistake
        getattr(answer, broken)[0, 1] = torch.nan
        assert "step 7: the loss is nan; the cached teacher's" in explain(7, torch.nan, split, answer, data)
