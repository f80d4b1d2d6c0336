"""Mixtures of experts as students: planned, guarded, trained, saved, and read by plain transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdqat.allocate import Uniform
from kdqat.exporters import DequantizedHF
from kdqat.initializers import RTN, MSEGrid
from kdqat.models import ModelSource, SplitModel, layer_refs
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, FakeQuantExperts, full_precision
from kdqat.spec import QuantPlan, preset
from kdqat.student import load_student, prepare_student, save_student, stored_bytes
from kdqat.training.optim import parameter_groups
from kdqat.types import Batch

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")
every_kind = pytest.mark.parametrize("kind", KINDS)
IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
EXPERTS = {"mixtral": 128, "qwen2_moe": 64, "qwen3_moe": 64}  # width of one


def student(kind: str, scheme: str = "W4A16_G32", quantizer=LSQ, **kwargs):
    allocator = Uniform(scheme, ignore=("lm_head", "router"), **kwargs)
    return prepare_student(ModelSource(f"toy:{kind}"), allocator, quantizer, RTN())


@torch.no_grad()
def logits(model) -> Tensor:
    return model(input_ids=IDS).logits


@every_kind
def test_experts_are_planned_by_weight_and_routers_have_a_role_of_their_own(kind):
    refs = {ref.name: ref for ref in layer_refs(toy_model(kind)) if ref.block == 1}
    width, experts = EXPERTS[kind], "model.layers.1.mlp.experts"
    assert refs[f"{experts}.gate_up_proj"].shape == (4 * 2 * width, 64)
    assert refs[f"{experts}.down_proj"].shape == (4 * 64, width)
    routers = {name for name, ref in refs.items() if ref.role == "router"}
    shared = {"model.layers.1.mlp.shared_expert_gate"} if kind == "qwen2_moe" else set()
    assert routers == {"model.layers.1.mlp.gate"} | shared


@every_kind
def test_everything_but_head_and_routers_is_covered(kind):
    ours = student(kind)
    assert not ours.coverage.missed
    left = {name.rpartition(".")[2] for name in ours.coverage.ignored}
    assert left == {"lm_head", "gate"} | ({"shared_expert_gate"} if kind == "qwen2_moe" else set())
    experts = 2 * 4 * 3 * 64 * EXPERTS[kind]
    attention = 2 * (2 * 64 * 64 + 2 * 32 * 64)
    shared = 2 * 3 * 64 * 128 if kind == "qwen2_moe" else 0
    assert ours.coverage.quantized == experts + attention + shared


@pytest.mark.parametrize(("kind", "type_"), [("mixtral", "MixtralTopKRouter"), ("qwen3_moe", "Qwen3MoeTopKRouter")])
def test_a_planned_router_is_refused_by_name_and_a_forgotten_one_stops_the_run(kind, type_):
    named = Uniform("W4A16", overrides={"router": "W8A16"})
    with pytest.raises(ValueError, match=rf"layer model\.layers\.0\.mlp\.gate: it is a {type_}; .*into `ignore`"):
        prepare_student(ModelSource(f"toy:{kind}"), named, LSQ, RTN())
    unnamed = prepare_student(ModelSource(f"toy:{kind}"), Uniform("W4A16"), LSQ, RTN())
    assert "model.layers.0.mlp.gate" in unnamed.coverage.ignored

    class Forgetful(Uniform):
        def allocate(self, layers):
            plan = super().allocate(layers)
            return QuantPlan(plan.layers, tuple(name for name in plan.ignored if "mlp.gate" not in name))

    with pytest.raises(ValueError, match=r"full precision: model\.layers\.0\.mlp\.gate and 1 more; put them into"):
        prepare_student(ModelSource(f"toy:{kind}"), Forgetful("W4A16", ignore=("lm_head", "router")), LSQ, RTN())


@every_kind
def test_keys_are_the_hf_keys_and_those_of_fake_quantizers(kind):
    keys = student(kind).model.state_dict().keys()
    assert {key for key in keys if "_fake_quantizer." not in key} == set(toy_model(kind).state_dict())


@every_kind
def test_switched_off_it_is_the_plain_model(kind):
    ours, plain = student(kind).model, toy_model(kind).eval()
    with full_precision(ours):
        torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-4, atol=1e-6)
    assert (logits(ours) - logits(plain)).abs().max() > 1e-3


@every_kind
def test_a_step_reaches_latent_weights_and_scales_of_every_expert(kind):
    ours = student(kind)
    out = SplitModel(ours.model)(Batch(IDS, IDS))
    out.head(out.hidden).square().sum().backward()
    for name, layer in ours.layers.items():
        assert layer.weight.grad.any() and layer.weight_fake_quantizer.scale.grad.any(), name
        if ".experts." in name:
            assert all(expert.any() for expert in layer.weight.grad)
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(ours.model)}
    for layer in ours.layers.values():
        assert id(layer.weight) in groups["weights"] and id(layer.weight_fake_quantizer.scale) in groups["scales"]


@every_kind
def test_it_survives_saving_bit_for_bit_and_plain_transformers_reads_its_latent_weights(kind, tmp_path):
    ours = student(kind)
    save_student(ours, tmp_path)
    again = load_student(tmp_path)
    assert torch.equal(logits(again.model), logits(ours.model))
    assert {type(m) for n, m in again.model.named_modules() if n.endswith("experts")} == {FakeQuantExperts}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with full_precision(ours.model):
        torch.testing.assert_close(logits(plain), logits(ours.model), rtol=1e-4, atol=1e-6)


@every_kind
def test_its_dequantized_export_computes_the_same_in_plain_transformers(kind, tmp_path):
    ours = student(kind)
    DequantizedHF().export(ours, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    torch.testing.assert_close(logits(plain), logits(ours.model), rtol=1e-5, atol=1e-6)


def test_initializers_see_experts_as_layers_of_their_block():
    coarse = prepare_student(ModelSource("toy:mixtral"), Uniform("W2A16", ignore=("lm_head", "router")), LSQ, MSEGrid())
    rtn = student("mixtral", "W2A16")
    for name in (n for n in rtn.layers if ".experts." in n):
        errors = [
            (s.layers[name].fake_quantized_weight() - s.layers[name].weight).square().sum() for s in (coarse, rtn)
        ]
        assert errors[0] < errors[1], name


def test_overrides_may_name_experts_by_role_and_bits_are_counted_by_hand():
    ours = student("qwen3_moe", "W4A16", overrides={"gate_up": "W2A16", "*.down_proj": "W8A16"})
    assert ours.plan["model.layers.0.mlp.experts.gate_up_proj"] == preset("W2A16")
    assert ours.plan["model.layers.1.mlp.experts.down_proj"] == preset("W8A16")
    per_block = 12288 * 4 + 4 * 128 * 64 * 2 + 4 * 64 * 64 * 8  # attention, gate and up, down
    scales = 16 * (192 + 4 * 128 + 4 * 64)  # fp16, one for each row
    rest = 260 * 64 + 2 * (4 * 64) + 5 * 64 + 4 * 16  # tied head, routers, norms of width 64, norms of q and k
    assert stored_bytes(ours)["student"] == 2 * (per_block + scales) // 8 + 2 * rest
