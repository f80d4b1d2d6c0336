"""A float8 teacher answers nearly what the bf16 one does, says what it left alone, and compiles without a break."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from kdqat.models import FrozenTeacher, ModelSource, SplitModel
from kdqat.models.fp8 import Float8Linear, to_e4m3, to_float8
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.types import Batch
from tests.models.stories import stories260k, stories_text

IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def teacher_of(path: str = "toy:llama", device: torch.device = CPU, **options: Any) -> FrozenTeacher:
    source, teacher = ModelSource(path), FrozenTeacher(**options)
    teacher.prepare(source, SplitModel(source.load_model()), source.load_tokenizer(), pristine=True)
    teacher.place(device)
    return teacher


def log_probs(teacher: FrozenTeacher, ids: torch.Tensor, device: torch.device = CPU) -> torch.Tensor:
    outputs = teacher.outputs(Batch(ids.to(device), ids.to(device)))
    return outputs.head(outputs.hidden).float().log_softmax(-1).cpu()


def test_rows_are_rounded_to_e4m3_under_a_scale_each() -> None:
    rows = torch.tensor([[1.0, -2.0, 0.3], [1e-6, 3e-6, 0.0], [0.0, 0.0, 0.0], [3e4, 1e4, -3e4]])
    codes, scale = to_e4m3(rows)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (4, 1)
    assert codes.float().abs().amax(dim=1).tolist() == [448, 448, 0, 448]
    torch.testing.assert_close(codes.float() * scale, rows, rtol=2**-4, atol=0)  # 3 bits behind the point


def test_a_layer_is_the_product_of_its_codes() -> None:
    linear = nn.Linear(32, 16, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 32).bfloat16()
    weight, weight_scale = to_e4m3(linear.weight)
    inputs, scale = to_e4m3(x)
    expected = (inputs.float() * scale) @ (weight.float() * weight_scale).t()
    torch.testing.assert_close(Float8Linear(linear)(x), expected.bfloat16() + linear.bias, rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(Float8Linear(linear)(x), linear(x), rtol=0.1, atol=0.1)


def test_the_layers_of_the_blocks_are_turned_and_the_head_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kdqat")
    model: Any = teacher_of(fp8=True).split.model  # type: ignore[union-attr]
    names = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert len(names) == 14 and all(name.startswith("model.layers.") for name in names)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    assert [record.message for record in caplog.records if record.name.startswith("kdqat")] == [
        "teacher: 14 of 14 layers compute in float8",
        "teacher fp8: cpu has no float8 arithmetic; it is emulated, and slower than without fp8",
    ]


def test_what_stays_is_counted_aloud(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kdqat")
    model = toy_model("llama").bfloat16()
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 72, dtype=torch.bfloat16)
    to_float8(model)
    assert caplog.records[-1].message == (
        "teacher: 13 of 14 layers compute in float8; 1 stay in bfloat16 (e.g. model.layers.0.mlp.up_proj)"
    )
    mixture = toy_model("qwen2_moe").bfloat16()
    to_float8(mixture)  # fused experts, routers and the gate of the shared expert stay
    assert type(mixture.model.layers[0].mlp.gate).__name__ != "Float8Linear"
    assert isinstance(mixture.model.layers[0].self_attn.q_proj, Float8Linear)
    assert "stay in bfloat16" in caplog.records[-1].message


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the 8 layers in the blocks is a linear one"):
        to_float8(toy_model("gpt2").bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_float8_goes_with_bfloat16_only(dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"fp8 goes with dtype bfloat16, .* not with {dtype}"):
        FrozenTeacher(fp8=True, dtype=dtype)


def test_a_float8_teacher_cannot_be_sharded() -> None:
    with pytest.raises(ValueError, match=r"teacher\.fp8 and model\.parallel\.shard exclude each other"):
        teacher = teacher_of(fp8=True)
        teacher.place(CPU, lambda split: None)


def test_a_trained_model_loses_little_in_float8() -> None:
    tokenizer = ModelSource(stories260k()).load_tokenizer()
    with open(stories_text()) as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"][: 3 * 512]).view(3, 512)
    full = log_probs(teacher_of(stories260k()), ids)
    rounded = log_probs(teacher_of(stories260k(), fp8=True), ids)
    kl = float((full.exp() * (full - rounded)).sum(-1).mean())
    assert 1e-3 < kl < 0.02  # docs/optimizers.md: 0.0094
    assert float((full.argmax(-1) == rounded.argmax(-1)).float().mean()) > 0.93


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_compiled_blocks_answer_as_plain_ones(fp8: bool) -> None:
    plain, compiled = teacher_of(fp8=fp8), teacher_of(fp8=fp8, compile=True)
    compiled.place(CPU)  # evaluation places once more
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    difference = (log_probs(plain, IDS) - log_probs(compiled, IDS)).abs().max()
    assert 0 <= float(difference) < 0.05
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compile_is_asked_of_every_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: asked.append(self))
    teacher = teacher_of(compile=True)
    order: list[str] = []
    teacher.place(CPU)
    assert asked == list(teacher.split.model.model.layers)  # type: ignore[union-attr]
    teacher.release()
    monkeypatch.setattr(nn.Module, "compile", lambda self: order.append("compile"))
    source = ModelSource("toy:llama")
    teacher.prepare(source, SplitModel(source.load_model()), toy_tokenizer(), pristine=True)
    teacher.place(CPU, lambda split: order.append("shard"))
    assert order == ["compile", "compile", "shard"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_kernel_computes_what_the_emulation_does() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8 arithmetic, compute capability 8.9")
    device = torch.device("cuda")
    linear = nn.Linear(576, 1536, dtype=torch.bfloat16)
    x = torch.randn(3, 33, 576).bfloat16()
    native, emulated = Float8Linear(linear), Float8Linear(linear)
    native = copy.deepcopy(native).to(device)  # they share a bias
    native.native = True
    values, expected = native(x.to(device)).cpu().float(), emulated(x).float()
    assert (values - expected).norm() <= 2**-7 * expected.norm()  # single codes differ where a scale is one ulp off
    for options in ({}, {"compile": True}):
        kernel = log_probs(teacher_of(device=device, fp8=True, **options), IDS, device)
        torch.testing.assert_close(kernel, log_probs(teacher_of(fp8=True), IDS), rtol=0, atol=0.1)
