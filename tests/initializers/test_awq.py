"""AWQ: the full-precision model stays what it was, the layers' output error falls, and unknown families are refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration, Hessian, stream_blocks
from kdqat.initializers import AWQ, RTN
from kdqat.initializers.awq_search import rounded, search_clip, search_scale
from kdqat.models import ModelSource, SplitModel
from kdqat.models.roles import FAMILIES
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, Fixed
from kdqat.quant.functional import fake_quantize
from kdqat.quant.ranges import choose_qparams
from kdqat.student import prepare_student
from tests.initializers.error import hidden_error
from tests.quant.specs import make_spec

TEXT = Calibration("kdqat:prose", seq_len=64, num_rows=4)
FOLDED = tuple(kind for kind, family in FAMILIES.items() if family.folds)
ATTENTION = ("*self_attn*", "*shared_expert.*")
GROUPS = make_spec(3, "group", group_size=8)


def problem(outliers: float = 12.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, 32] and inputs [T, 32], of which two features are `outliers` times larger."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 32, generator=generator), torch.randn(200, 32, generator=generator)
    inputs[:, [3, 20]] *= outliers
    return weight, inputs


def plan_of(kind: str) -> Uniform:
    """W3 for every layer whose inputs can be heard: experts stay as they are."""
    return Uniform("W3A16_G32", ignore=["lm_head", *(["*experts.*"] if FAMILIES[kind].roles.get("mlp.gate") else [])])


@pytest.mark.parametrize("kind", FOLDED)
def test_the_full_precision_model_is_unchanged_by_the_folded_scales(kind):
    split = SplitModel(toy_model(kind))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for p in split.parameters():  # toys have biases of 0 and norms of 1
            p.add_(0.1 * torch.randn_like(p) * (p.ndim == 1))
    before = copy.deepcopy(split)
    source = ModelSource(f"toy:{kind}")
    student = prepare_student(source, plan_of(kind), Fixed, AWQ(), calibration=TEXT, split=split)
    assert hidden_error(student, TEXT, quantized=False, original=before) < 1e-5
    original = before.model.state_dict()
    moved = [name for name, p in student.model.state_dict().items() if name in original and not p.equal(original[name])]
    assert any("norm" in name or "ln_" in name for name in moved)  # something was folded


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "opt", "gpt2"])
def test_the_quantized_model_is_nearer_to_its_source_than_rtns(kind):
    rtn, awq = (
        prepare_student(ModelSource(f"toy:{kind}"), plan_of(kind), Fixed, initializer, calibration=TEXT)
        for initializer in (RTN(), AWQ())
    )
    assert hidden_error(awq, TEXT) < 0.9 * hidden_error(rtn, TEXT)


def test_every_fold_of_a_family_is_found_in_a_toy_of_it():
    """A suffix with a typo would be a fold that never happens."""
    for kind in FOLDED:
        model = toy_model(kind)
        names = {name for name, _ in SplitModel(model).model.get_submodule(FAMILIES[kind].blocks)[0].named_modules()}
        missing = [s for fold in FAMILIES[kind].folds for s in (fold.producer, *fold.consumers) if s not in names]
        dense_only = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
        allowed = {*dense_only, "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"}
        assert not missing or (kind in ("mixtral", "qwen2_moe", "qwen3_moe") and set(missing) <= allowed)


@pytest.mark.parametrize("outliers", [1.0, 12.0])
def test_the_searched_scale_lowers_the_output_error_and_never_raises_it(outliers):
    weight, inputs = problem(outliers)
    quantizer, hessian = Fixed(GROUPS, weight.shape), inputs.T @ inputs
    scale = search_scale([(weight, quantizer)], hessian, inputs.abs().mean(0), num_ratios=20)
    errors = [
        (inputs @ (rounded(weight * s, quantizer) / s - weight).T).square().sum() for s in (scale, torch.ones(32))
    ]
    assert errors[0] <= errors[1]
    if outliers > 1:
        assert errors[0] < 0.5 * errors[1] and scale[3] > 1 > scale[4]


def test_the_searched_scale_is_the_best_power_of_the_magnitudes():
    weight, inputs = problem()
    quantizer, hessian, magnitude = Fixed(GROUPS, weight.shape), inputs.T @ inputs, inputs.abs().mean(0)
    scale = search_scale([(weight, quantizer)], hessian, magnitude, num_ratios=20)
    tried = []
    for r in range(20):
        s = magnitude ** (r / 20)
        s = s / (s.max() * s.min()).sqrt()
        tried.append((float((inputs @ (rounded(weight * s, quantizer) / s - weight).T).square().sum()), s))
    torch.testing.assert_close(scale, min(tried, key=lambda pair: pair[0])[1])


def test_clipping_is_chosen_group_by_group_for_what_the_group_adds_to_the_output():
    weight, inputs = problem()
    quantizer = Fixed(GROUPS, weight.shape)
    found = search_clip(weight, quantizer, inputs.T @ inputs, num_steps=20, max_shrink=0.5)
    groups = quantizer.groups(weight)
    shrunk = found.scale / choose_qparams(groups, quantizer.grid, GROUPS).scale
    torch.testing.assert_close(shrunk * 20, (shrunk * 20).round(), rtol=0, atol=1e-4)
    assert 0.55 - 1e-4 <= shrunk.min() < shrunk.max() <= 1
    x = inputs.reshape(-1, 4, 8)
    best = None
    for c in range(10):  # by hand: the partial products of each row and group
        trial = choose_qparams(groups, quantizer.grid, GROUPS, 1 - c / 20)
        lost = fake_quantize(groups, trial, quantizer.grid, GROUPS) - groups
        error = torch.einsum("tng,ong->ton", x, lost).square().sum(0)
        best = error if best is None else torch.minimum(best, error)
    lost = fake_quantize(groups, found, quantizer.grid, GROUPS) - groups
    torch.testing.assert_close(torch.einsum("tng,ong->ton", x, lost).square().sum(0), best, rtol=1e-3, atol=1e-3)


def test_q_and_k_are_not_clipped_and_v_feeds_o_only_where_they_are_equally_wide():
    student = prepare_student(ModelSource("toy:llama"), Uniform("W3A16_G32"), Fixed, AWQ(), calibration=TEXT)
    for name, layer in student.layers.items():
        full = layer.weight_fake_quantizer.initial_qparams(layer.weight_fake_quantizer.groups(layer.weight)).scale
        clipped = (layer.weight_fake_quantizer.scale < 0.99 * full).any()
        assert clipped != name.endswith(("q_proj", "k_proj"))
    o_proj = student.layers["model.layers.0.self_attn.o_proj"]  # grouped queries: two heads of v for four of o
    assert torch.equal(o_proj.weight, toy_model("llama").model.layers[0].self_attn.o_proj.weight)
    student = prepare_student(ModelSource("toy:opt"), Uniform("W3A16_G32"), Fixed, AWQ(), calibration=TEXT)
    out = student.layers["model.decoder.layers.0.self_attn.out_proj"]
    assert not torch.equal(out.weight, toy_model("opt").model.decoder.layers[0].self_attn.out_proj.weight)


def test_ranges_are_clipped_for_the_inputs_that_layers_have_after_folding():
    initializer, used = AWQ(), []
    original = AWQ._set_range
    initializer._set_range = lambda layer, hessian, **k: (
        used.append(hessian),
        original(initializer, layer, hessian, **k),
    )
    student = prepare_student(ModelSource("toy:llama"), Uniform("W3A16_G32"), Fixed, initializer, calibration=TEXT)
    heard = {name: Hessian() for name in student.layers}
    for call in stream_blocks(student.split, TEXT.batches(student.tokenizer)):
        own = {name: h.update for name, h in heard.items() if call.prefix and name.startswith(call.prefix + ".")}
        call.run(on_input=own)
    assert len(used) == len(heard) == 14
    order = [name for block in (0, 1) for name in student.layers if f"layers.{block}." in name]
    for hessian, name in zip(used, order, strict=True):
        torch.testing.assert_close(hessian, heard[name].matrix, rtol=1e-3, atol=1e-2)


def test_a_consumer_that_stays_in_full_precision_takes_its_scale_too():
    plan = Uniform("W3A16_G32", ignore=["lm_head", "q", "gate"])
    student = prepare_student(ModelSource("toy:llama"), plan, Fixed, AWQ(), calibration=TEXT)
    assert hidden_error(student, TEXT, quantized=False) < 1e-5


def test_families_without_folds_are_refused_by_role_and_wrong_folds_by_the_output(monkeypatch):
    with pytest.raises(ValueError, match=r"layer bert\.encoder.*query: AWQ does not know .* role 'q' in this family"):
        prepare_student(
            ModelSource("toy:bert"), Uniform("W4A16_G32", ignore=["lm_head"]), Fixed, AWQ(), calibration=TEXT
        )
    llama = FAMILIES["llama"]
    wrong = tuple(replace(fold, consumers=fold.consumers[:1]) for fold in llama.folds)
    monkeypatch.setitem(FAMILIES, "llama", replace(llama, folds=wrong))
    with pytest.raises(ValueError, match=r"block model\.layers\.0: its output in full precision changed"):
        prepare_student(ModelSource("toy:llama"), Uniform("W4A16_G32"), Fixed, AWQ(), calibration=TEXT)


def test_static_activation_ranges_are_refused_for_they_were_set_before():
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj: AWQ rescales activations"):
        prepare_student(ModelSource("toy:llama"), Uniform("W8A8_STATIC"), LSQ, AWQ(), calibration=TEXT)
    student = prepare_student(ModelSource("toy:llama"), Uniform("W4A8_G32"), Fixed, AWQ(num_ratios=3), calibration=TEXT)
    assert len(student.layers) == 14


@pytest.mark.parametrize("bad", [{"num_ratios": 0}, {"num_clip_steps": 0}, {"max_shrink": 1.0}])
def test_numbers_that_make_no_search_are_refused(bad):
    with pytest.raises(ValueError, match="AWQ needs"):
        AWQ(**bad)
