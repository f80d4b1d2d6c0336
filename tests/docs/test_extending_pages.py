"""Every python example of docs/extending is executed and held to the contract of its kind; every recipe snippet parses.

Where a contract test exists its own functions are called with the example, so the pages cannot drift from them.
"""

from __future__ import annotations

import json
import re

import pytest
import torch

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration, layer_inputs, stream_blocks
from kdqat.initializers import RTN
from kdqat.losses import ForwardKL
from kdqat.spec import LayerScheme, QuantPlan, QuantSpec, preset
from kdqat.types import BlockView, LayerRef
from tests.contracts import (
    test_allocators,
    test_exporters,
    test_initializers,
    test_losses,
    test_quantizers,
    test_scorers,
)
from tests.docs.examples import NAMES, PAGES, SNIPPET, SOURCE, parsed, student
from tests.quant.specs import SOME_GRIDS, make_spec, spec_id

every_grid = pytest.mark.parametrize("spec", SOME_GRIDS, ids=spec_id)


def test_there_is_a_page_for_every_kind_and_the_index_names_it():
    kinds = {
        "quantizer",
        "loss",
        "initializer",
        "allocator",
        "exporter",
        "evaluator",
        "callback",
        "data_source",
        "scorer",
    }
    assert set(NAMES) == {*kinds, "data_source", "format", "model_family"}
    index = (PAGES / "README.md").read_text()
    assert all(f"({name}.md)" in index for name in NAMES)


@pytest.mark.parametrize("page", NAMES)
def test_a_page_has_a_complete_example_a_recipe_and_names_its_test(page):
    text = (PAGES / f"{page}.md").read_text()
    assert SOURCE.search(text) and len(SNIPPET.findall(text)) == 1
    assert re.search(r"`tests/[\w/]+\.py`", text)


@pytest.mark.parametrize("page", NAMES)
def test_the_recipe_of_a_page_parses_and_builds_the_example(page, folder, tmp_path):
    recipe = parsed(page, tmp_path)
    built = [recipe.model.loss, recipe.model.allocator, recipe.model.initializer, recipe.data]
    built += [recipe.scoring.scorer] if recipe.scoring is not None else []
    built += [*recipe.evaluators, *recipe.exporters, *(recipe.trainer["callbacks"] or [])]
    built.append(recipe.model.quantizer(preset("W4A16").weight, torch.Size((8, 32))))
    own = {type(part).__module__ for part in built} & {path.stem for path in folder.glob("*.py")}
    mine = {name for _, name in SOURCE.findall((PAGES / f"{page}.md").read_text())}
    # a family is found by the model's own type, and a format's levels stand in the recipe
    assert own <= mine and (own or page in ("format", "model_family"))


@every_grid
@pytest.mark.parametrize(
    "clause",
    [
        test_quantizers.test_state_is_complete_before_the_first_forward_and_loads_strictly,
        test_quantizers.test_scales_have_a_dimension_fp32_and_the_shape_of_the_spec,
        test_quantizers.test_it_builds_on_the_meta_device_and_can_be_filled_there,
        test_quantizers.test_forward_is_pure,
        test_quantizers.test_applying_it_twice_with_its_stored_qparams_equals_once,
        test_quantizers.test_exported_codes_dequantize_to_exactly_the_forward_value,
        test_quantizers.test_a_group_holds_at_most_two_to_the_bits_levels,
        test_quantizers.test_gradients_of_input_and_parameters_are_finite_and_there,
        test_quantizers.test_it_compiles_whole_and_changing_bits_does_not_recompile,
    ],
    ids=lambda clause: clause.__name__,
)
def test_the_quantizer_meets_the_quantizer_contract(clause, spec, example):
    clause(example("power_of_two").PowerOfTwo, spec)


@every_grid
def test_the_quantizers_scales_are_powers_of_two(spec, example):
    quantizer = test_quantizers.make(example("power_of_two").PowerOfTwo, spec)
    exponents = quantizer.stored_qparams(test_quantizers.weights()).scale.abs().log2()
    assert torch.equal(exponents, exponents.round())


@pytest.mark.parametrize(
    "clause",
    [
        test_losses.test_a_divergence_is_zero_when_the_student_equals_the_teacher,
        test_losses.test_what_padding_holds_changes_nothing,
        test_losses.test_gradients_are_finite_and_padded_positions_get_none,
        test_losses.test_a_prediction_across_documents_is_not_counted,
        test_losses.test_parts_are_scalars_and_named_sums_are_detached,
        test_losses.test_gradient_never_reaches_the_teacher,
        test_losses.test_a_missing_teacher_is_an_error_with_a_remedy_where_one_is_needed,
        test_losses.test_a_token_loss_compiles_without_graph_breaks,
    ],
    ids=lambda clause: clause.__name__,
)
def test_the_loss_meets_the_loss_contract(clause, example):
    clause(example("top_k_kl").TopKKL)


def test_the_loss_is_the_plain_kl_where_k_is_the_vocabulary_and_refuses_k_of_one(example):
    cls, batch = example("top_k_kl").TopKKL, test_losses.ragged_batch()
    whole, plain = (test_losses.run(loss, batch).sum for loss in (cls(k=10**6), ForwardKL()))
    torch.testing.assert_close(whole, plain)
    assert test_losses.run(cls(k=2), batch).sum < plain
    with pytest.raises(ValueError, match="k must be at least 2"):
        cls(k=1)


@every_grid
@pytest.mark.parametrize(
    "clause",
    [
        test_initializers.test_every_layer_gets_finite_scales_that_fit_its_weights,
        test_initializers.test_the_weight_error_is_not_far_from_rtns,
        test_initializers.test_it_is_repeatable,
        test_initializers.test_zero_and_constant_weights_are_survived,
    ],
    ids=lambda clause: clause.__name__,
)
def test_the_initializer_meets_the_initializer_contract(clause, spec, example):
    clause(example("clip_at_rms").ClipAtRMS, spec)


def test_the_initializer_keeps_objects_and_weights_clips_outliers_and_refuses_live_ranges(example):
    cls = example("clip_at_rms").ClipAtRMS
    test_initializers.test_what_it_writes_survives_in_the_parameters_that_are_there(cls)
    test_initializers.test_only_one_that_says_so_rewrites_latent_weights(cls)
    test_initializers.test_for_live_ranges_it_either_has_nothing_to_set_or_names_the_layer(cls)
    scales = []
    for initializer in (RTN(), cls()):
        block = test_initializers.make_block(make_spec(4))
        with torch.no_grad():
            block.layers["block.a"].weight[:, 0] = 10.0
        initializer.initialize(block)
        scales.append(block.layers["block.a"].weight_fake_quantizer.scale)
    assert (scales[1] < scales[0]).all()


def test_the_initializer_with_inputs_clips_for_what_a_layer_sees(example):
    cls, text = example("weighted_clip").WeightedClip, Calibration("kdqat:prose", seq_len=32, num_rows=4)
    plain, weighted = (student("W3A16", initializer=made, calibration=text) for made in (RTN(), cls()))
    errors = {}
    for call in stream_blocks(plain.split, text.batches(plain.tokenizer)):
        names = [name for name in plain.layers if call.prefix and name.startswith(call.prefix)]
        for name, inputs in layer_inputs(call, names, max_tokens=4096).items():
            layers = [made.layers[name] for made in (plain, weighted)]
            wrong = [(layer.fake_quantized_weight() - layer.weight).detach().square() for layer in layers]
            errors[name] = [float((square * inputs.square().mean(0)).sum()) for square in wrong]
    assert len(errors) == 14
    assert all(ours <= theirs for theirs, ours in errors.values())
    assert sum(ours < theirs for theirs, ours in errors.values()) > 7
    with pytest.raises(ValueError, match=r"model\.calibration is missing"):
        student("W3A16", initializer=cls())


def test_the_initializer_with_inputs_lets_go_of_an_outlier_that_no_input_meets(example):
    class OneFeature:
        num_tokens = 8

        def run(self, on_input):
            for listener in on_input.values():
                listener(torch.eye(32)[3].repeat(8, 1))

    plain = test_initializers.make_block(preset("W4A16").weight)
    layer = plain.layers["block.a"]
    with torch.no_grad():
        layer.weight[:, 0], layer.weight[:, 3] = 1.0, 0.07  # 0.07 is half a step of 1/7
    example("weighted_clip").WeightedClip().initialize(BlockView(0, plain.layers, OneFeature()))
    torch.testing.assert_close(layer.weight_fake_quantizer.scale, torch.full((12, 1, 1), 0.5 / 7), rtol=1e-3, atol=0)


def test_the_allocator_meets_the_allocator_contract_and_spends_at_the_edges(example, tmp_path, monkeypatch):
    cls = example("edges_high").EdgesHigh
    monkeypatch.setitem(test_allocators.ARGUMENTS, cls, lambda _: cls("W4A16_G32", "W8A16"))
    test_allocators.test_every_layer_is_planned_or_ignored_and_never_both(cls, tmp_path)
    test_allocators.test_the_plan_fits_the_model_it_was_made_for(cls, tmp_path)
    test_allocators.test_it_is_repeatable_and_gives_an_equal_plan_after_a_round_trip(cls, tmp_path)
    layers = [LayerRef(f"model.layers.{i}.mlp.up_proj", i, "up", (64, 64)) for i in range(5)]
    plan = cls("W3A16", "W8A16", num_edge=2).allocate(layers)
    assert [plan[layer.name].weight.bits for layer in layers] == [8, 8, 3, 8, 8]


def test_the_scorer_meets_the_scorer_contract_and_finds_heavy_tails(example):
    cls = example("kurtosis").Kurtosis
    test_scorers.test_every_unit_it_can_score_gets_a_finite_number_and_units_cover_the_blocks(cls)
    test_scorers.test_it_is_repeatable_and_survives_json(cls)
    test_scorers.test_the_model_is_as_it_was(cls)
    split = test_scorers.split_model()
    with torch.no_grad():
        split.model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = 5.0
    assert test_scorers.scores_of(cls, split).ranking()[0] == "model.layers.1"


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_G32", "W8A16_G64"])
def test_the_exporter_writes_the_codes_and_its_reader_proves_them(scheme, example, reader_here, tmp_path):
    trained = test_exporters.trained("toy:llama", scheme)
    folder = api.export(trained, example("codes_file").CodesFile(), tmp_path / "out")
    assert {"codes.safetensors", "config.json", "tokenizer.json", "quant_plan.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert QuantPlan.load(folder) == trained.plan
    numbers = json.loads((folder / "parity.json").read_text())
    assert numbers["verified"] and numbers["codes"]["compared"] and numbers["logits"]["max_difference"] == 0


def test_the_exporter_refuses_what_it_cannot_hold_and_leaves_the_student_alone(example, tmp_path):
    exporter = example("codes_file").CodesFile()
    test_exporters.refuses_with_a_reason(exporter)
    test_exporters.left_as_it_was(exporter, "W4A16_G32", tmp_path)
    rotated = LayerScheme(weight=QuantSpec(format="int4", hadamard=32))
    for scheme in ("FP4_E2M1", "GGUF_Q4_1", "W2A16_HALF", rotated):
        assert "only symmetric integer" in exporter.refuses(student(scheme))
    cached = student(Uniform("W4A8", kv_cache="KV8"))
    assert exporter.refuses(cached).startswith("there is no place for activations, the KV cache")
    with pytest.raises(ValueError, match="q_proj: only symmetric integer weights fit"):
        api.export(student("W4A16_ASYM_G32"), exporter, tmp_path / "asymmetric")


def test_the_evaluator_returns_floats_and_one_for_a_student_that_is_its_teacher(example):
    cls = example("hidden_cosine").HiddenCosine
    evaluator = cls("kdqat:prose", seq_len=32, limit=4)
    coarse, fine = (api.evaluate(student(s), [evaluator])["kdqat:prose"] for s in ("W2A16_G32", "W8A16_G32"))
    for numbers in (coarse, fine):
        assert set(numbers) == {"hidden_cosine", "tokens"} and all(type(n) is float for n in numbers.values())
    assert coarse["hidden_cosine"] < fine["hidden_cosine"] <= 1.0 + 1e-6
    assert fine["hidden_cosine"] == pytest.approx(1.0, abs=1e-3) and fine["tokens"] == 4 * 32
    with pytest.raises(ValueError, match="needs a teacher"):
        evaluator.evaluate(student(), None)
