"""Students whose layers are no nn.Linear: GPT-2's Conv1D, embeddings tied to their head; and what a KV cache adds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdqat.allocate import Uniform
from kdqat.exporters import DequantizedHF
from kdqat.initializers import RTN, MSEGrid
from kdqat.models import ModelSource, SplitModel, layer_refs
from kdqat.models.roles import embedding_refs
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, FakeQuantConv1D, Fixed, full_precision, strip_fake_quant
from kdqat.spec import QuantPlan, parse_scheme
from kdqat.student import load_student, prepare_student, save_student, stored_bytes
from kdqat.training.optim import parameter_groups
from kdqat.types import Batch

IDS = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(0))


class WithEmbedding(Uniform):
    """Uniform, with the input embedding of a toy planned too."""

    def __init__(self, scheme: str, kind: str) -> None:
        super().__init__(scheme, ignore=())
        self.embedding = embedding_refs(toy_model(kind))[0].name

    def allocate(self, layers) -> QuantPlan:
        plan = super().allocate(layers)
        return QuantPlan({**plan.layers, self.embedding: self.scheme}, plan.ignored)


@torch.no_grad()
def logits(model) -> Tensor:
    return model(input_ids=IDS).logits


def rounded(x: Tensor) -> Tensor:
    """int4, one absmax scale for each token, written down without kdqat."""
    scale = x.abs().amax(-1, keepdim=True) / 7
    return (x / scale).round() * scale


def gpt2(scheme: str = "W4A16_G32", initializer=None, quantizer=LSQ, **kwargs):
    """GPT-2 with a head of its own, every layer planned."""
    split = SplitModel(toy_model("gpt2", tie=False).eval())
    plan = Uniform(scheme, **{"ignore": (), **kwargs})
    return prepare_student(ModelSource("toy:gpt2"), plan, quantizer, initializer or RTN(), split=split)


def with_embedding(kind: str, scheme: str = "W4A16_G32", initializer=None):
    """A student whose embedding is planned with everything else, tied to the head."""
    return prepare_student(ModelSource(f"toy:{kind}"), WithEmbedding(scheme, kind), LSQ, initializer or RTN())


@torch.no_grad()
def move(student) -> None:
    """Change weights and scales as training does."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "_fake_quantizer." in name:
            parameter.mul_(1 + 0.1 * noise.clamp(-1, 1))
        elif parameter.ndim > 1:
            parameter.add_(noise * parameter.std() * 0.1)


def test_gpt2_is_planned_wholly_and_its_layers_keep_their_transposed_weights():
    student = gpt2()
    assert student.coverage.share_full_precision == 0 and not student.coverage.ignored
    assert student.coverage.quantized == 260 * 64 + 2 * (64 * 192 + 64 * 64 + 2 * 64 * 128)
    layer = student.layers["transformer.h.0.attn.c_attn"]
    assert isinstance(layer, FakeQuantConv1D) and layer.weight.shape == (64, 192) and layer.matrix_shape == (192, 64)
    assert layer.weight_fake_quantizer.scale.shape == (192, 2, 1)  # groups lie along the inputs
    assert {k for k in student.model.state_dict() if "_fake_quantizer." not in k} == set(toy_model("gpt2").state_dict())


@pytest.mark.parametrize("initializer", [RTN(), MSEGrid(num_steps=5)], ids=["RTN", "MSEGrid"])
def test_gpt2s_scales_come_from_columns_of_its_weights(initializer):
    layer = gpt2("W4A16", initializer).layers["transformer.h.1.mlp.c_fc"]
    full = (layer.weight.abs().amax(0) / 7).half().float()
    scale = layer.weight_fake_quantizer.scale.flatten()
    if isinstance(initializer, RTN):
        torch.testing.assert_close(scale, full, rtol=1e-3, atol=0)
    else:
        assert (scale <= full * 1.001).all() and (scale < full * 0.99).any()


@torch.no_grad()
def test_gpt2_computes_with_its_rounded_weights_in_transformers_own_conv1d():
    student, plain = gpt2("W4A16", quantizer=LSQ), toy_model("gpt2", tie=False).eval()
    assert (logits(student.model) - logits(plain)).abs().max() > 1e-3
    with full_precision(student.model):
        torch.testing.assert_close(logits(student.model), logits(plain), rtol=1e-5, atol=1e-6)
    for name in student.layers:
        weight = plain.get_submodule(name).weight
        outputs = 1 if name == "lm_head" else 0
        scale = (weight.abs().amax(outputs, keepdim=True) / 7).half().float()
        weight.copy_((weight / scale).round().clamp(-8, 7) * scale)
    torch.testing.assert_close(logits(student.model), logits(plain), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_goes_into_a_conv1d_is_rounded_token_by_token():
    student, plain = gpt2("W4A4", ignore=("lm_head",)), strip_fake_quant(gpt2("W4A16", ignore=("lm_head",)).model)
    for name in student.layers:
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    torch.testing.assert_close(logits(student.model), logits(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantizer", [Fixed, LSQ])
@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A8", "W3A16_ASYM_G64", "NVFP4"])
def test_a_moved_gpt2_survives_saving_and_loading_bit_for_bit(tmp_path, scheme, quantizer):
    student = gpt2(scheme, ignore=("lm_head",))
    move(student)
    save_student(student, tmp_path)
    again = load_student(tmp_path, quantizer)
    assert torch.equal(logits(again.model), logits(student.model))
    assert again.plan == student.plan and again.summary() == student.summary()


def test_a_stripped_gpt2_is_a_plain_one_that_computes_what_the_student_did():
    student = gpt2()
    move(student)
    quantized = logits(student.model)
    plain = strip_fake_quant(student.model)
    assert {type(m) for m in plain.modules()} == {type(m) for m in toy_model("gpt2").modules()}
    torch.testing.assert_close(logits(plain), quantized, rtol=1e-5, atol=1e-6)


def test_gpt2_exports_and_learns(tmp_path):
    student = gpt2(ignore=("lm_head",))
    DequantizedHF().export(student, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain), logits(student.model), rtol=1e-5, atol=1e-6)
    out = student.split(Batch(IDS, IDS))
    out.head(out.hidden).square().sum().backward()
    assert all(
        layer.weight.grad.any() and layer.weight_fake_quantizer.scale.grad.any() for layer in student.layers.values()
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_tied_embedding_is_stored_once_and_learns_once(kind):
    student = with_embedding(kind)
    name = embedding_refs(student.model)[0].name
    embedding, head = student.layers[name], student.layers["lm_head"]
    assert embedding.weight is head.weight and embedding.weight_fake_quantizer is head.weight_fake_quantizer
    assert student.coverage.share_full_precision == 0
    groups = {group["name"]: [id(p) for p in group["params"]] for group in parameter_groups(student.model)}
    assert groups["weights"].count(id(head.weight)) == 1
    assert groups["scales"].count(id(head.weight_fake_quantizer.scale)) == 1
    half = prepare_student(ModelSource(f"toy:{kind}"), Uniform("W4A16_G32"), LSQ, RTN())
    saved = 260 * 64 * 16 - parse_scheme("W4A16_G32").weight.storage_bits((260, 64))
    assert stored_bytes(half)["student"] - stored_bytes(student)["student"] == saved / 8


@pytest.mark.parametrize("initializer", [RTN(), MSEGrid(num_steps=5)], ids=["RTN", "MSEGrid"])
def test_a_tied_embedding_survives_saving_and_export(tmp_path, initializer):
    student = with_embedding("llama", initializer=initializer)
    move(student)
    for folder in ("student", "export"):
        (tmp_path / folder).mkdir()
    save_student(student, tmp_path / "student")
    again = load_student(tmp_path / "student")
    embedding, head = again.layers["model.embed_tokens"], again.layers["lm_head"]
    assert embedding.weight is head.weight and embedding.weight_fake_quantizer is head.weight_fake_quantizer
    assert torch.equal(logits(again.model), logits(student.model))
    DequantizedHF().export(student, tmp_path / "export")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(logits(plain), logits(student.model))


def test_a_planned_embedding_leaves_the_layers_of_the_model_as_they_are():
    student = with_embedding("llama")
    assert [ref.name for ref in layer_refs(student.model)] == [ref.name for ref in layer_refs(toy_model("llama"))]
