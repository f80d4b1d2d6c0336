"""Static activation ranges come from what a layer really sees; dynamic ones need no text."""

from __future__ import annotations

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration, needs_range, set_range
from kdqat.initializers import RTN
from kdqat.models import ModelSource
from kdqat.quant import LSQ, Fixed, LSQPlus, MinMax, full_precision
from kdqat.quant.kv import kv_caches
from kdqat.spec import LayerScheme, QuantSpec
from kdqat.student import prepare_student
from kdqat.types import Batch

TEXT = Calibration("kdqat:prose", seq_len=32, num_rows=4, max_tokens=10_000)
STATIC = QuantSpec(format="int8", granularity="tensor", symmetric=False, zero_point="integer")
WIDTH = torch.Size((1, 16))


def test_a_static_range_covers_what_the_layer_sees_in_full_precision():
    student = prepare_student(ModelSource("toy:llama"), Uniform("W8A8_STATIC"), LSQ, RTN(), calibration=TEXT)
    name = "model.layers.1.mlp.down_proj"
    layer, seen = student.layers[name], []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with full_precision(student.model), torch.no_grad():
        for batch in TEXT.batches(student.tokenizer):
            student.split(batch)
    hook.remove()
    rows = torch.cat(seen)
    quantizer = layer.activation_fake_quantizer
    low, high = rows.min().clamp(max=0), rows.max().clamp(min=0)
    torch.testing.assert_close(quantizer.scale.detach(), ((high - low) / 255).reshape(1))
    assert torch.equal(quantizer.zero_point.detach().round(), (-low / quantizer.scale.detach()).round())


def test_static_outputs_are_calibrated_too_and_a_saved_range_is_used_as_it_is():
    scheme = LayerScheme(weight=QuantSpec(format="int8"), output=QuantSpec(format="int8", granularity="feature"))
    student = prepare_student(ModelSource("toy:llama"), Uniform(scheme), LSQ, RTN(), calibration=TEXT)
    layer = student.layers["model.layers.0.self_attn.k_proj"]
    assert isinstance(layer.output_fake_quantizer, LSQPlus)
    assert layer.output_fake_quantizer.scale.shape == (1, 1, 32) and layer.output_fake_quantizer.scale.std() > 0


def test_mse_ranges_clip_an_outlier_that_minmax_covers():
    rows = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    rows[0, 0] = 60.0
    spec = QuantSpec(format="int4", granularity="tensor")
    scales = {}
    for method in ("minmax", "mse"):
        quantizer = Fixed(spec, WIDTH)
        set_range(quantizer, rows, method=method)
        scales[method] = quantizer.scale.item()
        assert (quantizer(rows) - rows).square().mean() < {"minmax": 2, "mse": 1}[method] * 9
    assert scales["minmax"] == pytest.approx(60 / 7) and scales["mse"] < 0.5 * scales["minmax"]


def test_a_dynamic_range_stores_nothing_but_its_second_level():
    nvfp4 = QuantSpec(format="e2m1", granularity="group", group_size=16, scale_dtype="e4m3_global", dynamic=True)
    plain = MinMax(QuantSpec(format="int8", granularity="token", dynamic=True), WIDTH)
    quantizer = MinMax(nvfp4, WIDTH)
    assert not needs_range(plain) and needs_range(quantizer) and not needs_range(None)
    rows = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * 1e-4
    before = (quantizer(rows) - rows).square().mean()
    set_range(quantizer, rows, method="minmax")
    torch.testing.assert_close(quantizer.global_scale, (448 * 6 / rows.abs().amax()).reshape(1))
    assert (quantizer(rows) - rows).square().mean() < 0.1 * before  # e4m3 alone does not reach so small scales


def test_nvfp4_without_calibration_trains_on_a_global_scale_of_one_and_with_it_on_the_texts():
    free = prepare_student(ModelSource("toy:llama"), Uniform("NVFP4"), LSQ, RTN())
    text = prepare_student(ModelSource("toy:llama"), Uniform("NVFP4"), LSQ, RTN(), calibration=TEXT)
    name = "model.layers.0.mlp.up_proj"
    assert free.layers[name].activation_fake_quantizer.global_scale.item() == 1
    assert text.layers[name].activation_fake_quantizer.global_scale.item() > 1


def test_the_calibrated_student_computes_near_the_full_precision_one():
    student = prepare_student(ModelSource("toy:llama"), Uniform("W8A8_STATIC"), LSQ, RTN(), calibration=TEXT)
    ids = torch.randint(3, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = student.split(Batch(ids, ids)).hidden
        with full_precision(student.model):
            theirs = student.split(Batch(ids, ids)).hidden
    assert 0 < (ours - theirs).norm() < 0.05 * theirs.norm()


def test_a_static_kv_cache_is_calibrated_by_channel_and_its_observer_is_gone_afterwards():
    cache = {"key": {"format": "int8", "granularity": "feature"}, "value": {"format": "e4m3", "granularity": "tensor"}}
    plan = Uniform("W8A16", kv_cache=cache)
    with pytest.raises(ValueError, match=r"model\.calibration is missing"):
        prepare_student(ModelSource("toy:llama"), plan, LSQ, RTN())
    student = prepare_student(ModelSource("toy:llama"), plan, LSQ, RTN(), calibration=TEXT)
    for found in kv_caches(student.model).values():
        assert found.key.scale.shape == (1, 1, 32) and found.key.scale.std() > 0 and found.observer is None
        assert found.value.scale.shape == (1,) and 0 < found.value.scale < 0.1


def test_a_cache_before_rope_is_the_output_of_k_and_v():
    student = prepare_student(
        ModelSource("toy:llama"), Uniform("W8A16", kv_cache="KV8", kv_position="before_rope"), LSQ, RTN()
    )
    outputs = {name.rpartition(".")[2] for name, layer in student.layers.items() if layer.output_fake_quantizer}
    assert outputs == {"k_proj", "v_proj"} and not kv_caches(student.model) and student.plan.kv_cache is None


def test_what_is_deployed_only_is_off_in_training_and_on_in_evaluation():
    plan = Uniform("W4A4", kv_cache="KV4", deploy_only=["activation", "kv_cache"])
    student = prepare_student(ModelSource("toy:llama"), plan, LSQ, RTN())
    weights_only = prepare_student(ModelSource("toy:llama"), Uniform("W4A16"), LSQ, RTN())
    ids = torch.randint(3, 250, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        train, evaluation = (student.split.train(mode)(Batch(ids, ids)).hidden for mode in (True, False))
        assert torch.equal(train, weights_only.split.train()(Batch(ids, ids)).hidden)
    assert (train - evaluation).norm() > 0.01 * train.norm()
    assert student.plan.deploy_only == ("activation", "kv_cache")
