"""torchao's and bitsandbytes' 8-bit Adam, and AdamWSR on a bf16 student, through a recipe: groups, schedule, resume.

torchao compiles its step, which takes a minute on a CPU; uncompiled it is the same arithmetic.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from kdqat import api
from kdqat.cli.parser import parse_recipe
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.quant import FakeQuantizer
from tests.cli.recipes import write
from tests.exporters.reading import loaded

STEPS = 6
TORCHAO = {"class_path": "torchao.optim.AdamW8bit", "init_args": {"lr": 1.0e-3}}
BITSANDBYTES = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 1.0e-3}}
ROUNDED = {"class_path": "torchao.optim.AdamW8bit", "init_args": {"lr": 1.0e-3, "bf16_stochastic_round": True}}
FOUR_BIT = {"class_path": "torchao.optim.AdamW4bit", "init_args": {"lr": 1.0e-3}}
FP8 = {"class_path": "torchao.optim.AdamWFp8", "init_args": {"lr": 1.0e-3}}
OURS = {"class_path": "AdamWSR", "init_args": {"lr": 1.0e-3, "state_dtype": "bfloat16"}}
EVERY = [
    pytest.param(TORCHAO, "float32", id="torchao"),
    pytest.param(FOUR_BIT, "float32", id="torchao 4 bit"),
    pytest.param(FP8, "float32", id="torchao fp8"),
    pytest.param(BITSANDBYTES, "float32", id="bitsandbytes"),
    pytest.param(ROUNDED, "bfloat16", id="torchao on bf16"),
    pytest.param(OURS, "bfloat16", id="AdamWSR on bf16"),
]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.chdir(tmp_path)


def fit(folder: Path, optimizer: dict[str, Any], dtype: str, resume_at: int | None = None) -> L.Trainer:
    """What `kdqat fit` does until the training is over."""
    pytest.importorskip(optimizer["class_path"].partition(".")[0]) if "." in optimizer["class_path"] else None
    toy_model("llama").save_pretrained(folder / "model")  # a toy cast to bf16 has no float32 rotary frequencies left
    toy_tokenizer().save_pretrained(folder / "model")
    recipe = parse_recipe(write(
        folder, model__optimizer=optimizer, model__student__dtype=dtype, trainer__max_steps=STEPS,
        model__student__path=str(folder / "model"),
        trainer__gradient_clip_val=1.0, trainer__default_root_dir=str(folder / "run"),
        trainer__callbacks=[{"class_path": "Checkpoints", "init_args": {"every_n_steps": 3, "keep_last": 2}}],
    ))  # fmt: skip
    L.seed_everything(recipe.seed, verbose=False)
    trainer = api.make_trainer(recipe.trainer, recipe.run.path)
    assert recipe.data is not None
    api.bind_data(recipe.data, recipe.model.build())
    checkpoint = folder / "run" / "checkpoints" / f"step={resume_at:08d}.ckpt" if resume_at else None
    trainer.fit(recipe.model, datamodule=recipe.data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def weights(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.lightning_module.state_dict().items()}


@pytest.mark.parametrize(("optimizer", "dtype"), EVERY)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    optimizer: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    whole = weights(fit(tmp_path, optimizer, dtype))
    at_three = torch.load(tmp_path / "run" / "checkpoints" / "step=00000003.ckpt", weights_only=True)["state_dict"]
    resumed = weights(fit(tmp_path, optimizer, dtype, resume_at=3))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], at_three[name]) for name in whole)


@pytest.mark.parametrize("optimizer", [TORCHAO, BITSANDBYTES], ids=["torchao", "bitsandbytes"])
def test_groups_schedule_and_small_tensors_are_as_with_torchs_adam(optimizer: dict[str, Any], tmp_path: Path) -> None:
    trainer = fit(tmp_path, optimizer, "float32")
    (made,) = trainer.optimizers
    rates = {group["name"]: float(group["initial_lr"]) for group in made.param_groups}
    assert rates == pytest.approx({"weights": 1e-3, "scales": 1e-4, "vectors": 1e-3})
    assert {group["name"]: group["weight_decay"] for group in made.param_groups} == {
        "weights": 0.01, "scales": 0.0, "vectors": 0.0,
    }  # fmt: skip
    assert all(float(group["lr"]) == 0 for group in made.param_groups)  # the cosine's end
    first = "state1" if "state1" in next(iter(made.state.values())) else "exp_avg"
    for group in made.param_groups:
        for parameter in group["params"]:
            moment = made.state[parameter][first]
            eight_bit = moment.dtype == torch.uint8 or type(moment).__name__ == "OptimState8bit"
            assert eight_bit == (parameter.numel() >= 4096), (group["name"], parameter.shape)


@pytest.mark.parametrize(("optimizer", "dtype"), EVERY[-2:])
def test_a_bf16_student_keeps_float32_scales_and_is_saved_evaluated_and_exported(
    optimizer: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    from kdqat.evaluators import TeacherAgreement
    from kdqat.exporters import DequantizedHF
    from kdqat.student import load_student, save_student

    module: Any = fit(tmp_path, optimizer, dtype).lightning_module
    student = module.student
    quantizers = [m for m in student.model.modules() if isinstance(m, FakeQuantizer)]
    assert quantizers and all(q.scale.dtype == torch.float32 for q in quantizers)
    assert {p.dtype for n, p in student.model.named_parameters() if "fake_quantizer" not in n} == {torch.bfloat16}
    student.split.eval()
    folder = tmp_path / "student"
    folder.mkdir()
    save_student(student, folder)
    again = load_student(folder)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        logits = student.model(ids).logits
        assert again.model.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(again.model(ids).logits, logits)
        for name, layer in student.layers.items():  # computed in float32, rounded once to bf16 at the end
            quantizer = layer.weight_fake_quantizer
            exact = quantizer(layer.weight.float())
            assert torch.equal(layer.fake_quantized_weight(), exact.bfloat16()), name
            assert torch.equal(quantizer.codes(layer.weight), quantizer.codes(layer.weight.float()))
    numbers = api.evaluate(again, [TeacherAgreement("kdqat:prose", seq_len=32, limit=2)])["kdqat:prose"]
    assert all(math.isfinite(value) for value in numbers.values())
    exported = loaded(api.export(again, DequantizedHF(), tmp_path / "export"))
    assert exported.lm_head.weight.dtype == torch.float32
    state = exported.state_dict()
    for name, layer in again.layers.items():
        assert torch.equal(state[f"{name}.weight"], layer.fake_quantized_weight().detach().float())


def test_a_missing_package_is_named_in_one_line(tmp_path: Path) -> None:
    recipe = write(tmp_path, model__optimizer={"class_path": "no_such_package.optim.AdamW"})
    with pytest.raises(ValueError, match="no_such_package") as refused:
        parse_recipe(recipe)
    assert "\n" not in str(refused.value)
