"""LoraAdapters: what trains and what rests, merging, saving, resuming, and who goes with it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.callbacks import LoraAdapters
from kdqat.data import PackedText
from kdqat.exporters import DequantizedHF
from kdqat.initializers import RTN
from kdqat.models import FrozenTeacher, SharedTeacher, SplitModel
from kdqat.models.source import ModelSource
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.quant import LSQ, FakeQuantizer, MinMax, full_precision
from kdqat.report import report
from kdqat.student import Student, load_student, save_student
from kdqat.training import Checkpoints, KDQATModule, Parallel
from kdqat.training.gather import gather_student
from tests.cli.recipes import write
from tests.exporters.reading import loaded
from tests.training.toy import batch, make_module, train

IDS = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(0))
BATCHES = [batch(2, seed=seed) for seed in range(3)]
both = pytest.mark.parametrize("placement", ["inside", "outside"])
LOADER = """
import sys, torch, kdqat
from pathlib import Path
student = kdqat.load_student(Path(sys.argv[1]))
with torch.no_grad():
    torch.save(student.split.eval().model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def answers(student: Student) -> torch.Tensor:
    with torch.no_grad():
        return student.split.eval().model(input_ids=IDS).logits


def fit(module: KDQATModule, edit: LoraAdapters, *, run: Path | None = None, **args: Any) -> KDQATModule:
    """Train toy:llama on BATCHES; adapters are still on."""
    train(module, BATCHES, run=run, callbacks=[edit], **args)
    return module


def adapted(edit: LoraAdapters, **changes: Any) -> tuple[KDQATModule, Student]:
    """A trained student whose adapters are still on."""
    module = fit(make_module(optimizer=partial(torch.optim.AdamW, lr=1e-2), **changes), edit)
    assert module.student is not None
    return module, module.student


@pytest.mark.parametrize(
    ("quantizer", "scheme", "path"),
    [(MinMax, "W4A16_G32", "toy:llama"), (LSQ, "W4A16_G32", "toy:gpt2"), (MinMax, "W3A16_ASYM_G32", "toy:llama"),
     (LSQ, "W4A16", "toy:llama"), (LSQ, "NVFP4", "toy:llama")],
)  # fmt: skip
def test_inside_merged_logits_are_unmerged_logits_bit_for_bit(quantizer: Any, scheme: str, path: str) -> None:
    edit = LoraAdapters(rank=4)
    _, student = adapted(edit, quantizer=quantizer, initializer=RTN(), plan=Uniform(scheme), student=ModelSource(path))
    unmerged = answers(student)
    assert len(student.adapters) == len(student.layers) > 0
    edit.finish(student)
    assert not student.adapters and torch.equal(answers(student), unmerged)
    assert not any("adapter" in key for key in student.model.state_dict())


@both
def test_weights_rest_and_adapters_and_scales_train(placement: Any) -> None:
    edit = LoraAdapters(placement=placement, rank=4)
    module = make_module()
    student = module.build()
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    fit(module, edit)
    scales = {id(p) for m in student.model.modules() if isinstance(m, FakeQuantizer) for p in m.parameters()}
    for name, parameter in student.model.named_parameters():
        moves = ".adapter." in name or id(parameter) in scales
        assert name not in before or torch.equal(parameter, before[name]) != moves, name
        assert parameter.requires_grad == moves
    edit.finish(student)
    assert all(p.requires_grad for p in student.model.parameters())


def test_without_scales_the_adapters_alone_are_trained_as_ordinary_weights() -> None:
    edit = LoraAdapters(roles=["q", "down"], blocks=[-1], rank=4, train_scales=False)
    module = make_module()
    trainer = train(module, BATCHES, callbacks=[edit])
    (group,) = trainer.optimizers[0].param_groups
    assert module.student is not None
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert list(module.student.adapters) == names and group["name"] == "weights" and len(group["params"]) == 4


@both
@pytest.mark.parametrize("kept", [True, "selective"])
def test_checkpointed_blocks_train_to_the_same_bits(placement: Any, kept: Any) -> None:
    ends = [
        adapted(LoraAdapters(placement=placement), parallel=p)[1]
        for p in (Parallel(), Parallel(checkpoint_blocks=kept))
    ]
    states = [student.model.state_dict() for student in ends]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
@both
def test_compiled_blocks_train_to_the_same_student(placement: Any) -> None:
    changes = {"optimizer": partial(torch.optim.SGD, lr=1.0)}
    ends = []
    for parallel in (Parallel(), Parallel(compile_blocks=True)):
        module = fit(make_module(parallel=parallel, **changes), LoraAdapters(placement=placement))
        ends.append(module.split.state_dict())  # type: ignore[union-attr]
    assert ends[0].keys() == ends[1].keys()
    assert max(float((ends[0][key] - ends[1][key]).abs().max()) for key in ends[0]) < 1e-5


@both
def test_a_run_writes_what_it_did_and_the_report_says_it(placement: Any, tmp_path: Path) -> None:
    write(tmp_path, trainer__default_root_dir=str(tmp_path / "run"))
    student = trained(tmp_path / "run", placement)
    found = json.loads((tmp_path / "run" / "adapters.json").read_text())
    (tmp_path / "run" / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text())
    page = report([tmp_path / "run"], as_json=False)
    assert (tmp_path / "run" / "adapter").is_dir() == (placement == "inside")
    if placement == "inside":
        assert found == {"merged": {"layers": 14, "largest_change": 0.0}, "outside": {}}
        assert "Adapters of 14 layers are merged into student/" in page and not student.adapters
    else:
        assert found["merged"]["layers"] == 0 and set(found["outside"]) == {"q", "k", "v", "o", "gate", "up", "down"}
        assert all(0 < n["codes_changed"] < 1 and 0 < n["sqnr_db"] < 60 for n in found["outside"].values())
        assert f"| q | 2 | {100 * found['outside']['q']['codes_changed']:.1f} % |" in page


def trained(run: Path | None, placement: Any, student: Student | None = None, **changes: Any) -> Student:
    """A student through `api.fit`, adapters merged where they merge."""
    student = student if student is not None else api.quantize("toy:llama", "W4A16_G32")
    arguments: dict[str, Any] = {
        "data": PackedText("kdqat:prose", seq_len=32, batch_size=2, val_rows=2),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "callbacks": [LoraAdapters(placement=placement, rank=4)],
        "steps": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
    }
    return api.fit(student, out_dir=run, **{**arguments, **changes})


@both
def test_a_saved_student_answers_the_same_in_a_new_process_and_trains_on(placement: Any, tmp_path: Path) -> None:
    student = trained(None, placement)
    (tmp_path / "student").mkdir()
    save_student(student, tmp_path / "student")
    torch.save(IDS, tmp_path / "ids")
    command = [sys.executable, "-c", LOADER, *(str(tmp_path / name) for name in ("student", "ids", "logits"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), answers(student))
    assert (tmp_path / "student" / "adapter").is_dir() == (placement == "outside")
    loaded = load_student(tmp_path / "student", LSQ)
    assert {n: a.settings for n, a in loaded.adapters.items()} == {n: a.settings for n, a in student.adapters.items()}
    before = answers(loaded)
    again = trained(None, placement, loaded)
    assert again is loaded and not torch.equal(answers(again), before)
    assert bool(again.adapters) == (placement == "outside")


def test_a_student_that_is_saved_unmerged_comes_back_unmerged(tmp_path: Path) -> None:
    student = adapted(LoraAdapters(rank=4))[1]
    save_student(student, tmp_path)
    loaded = load_student(tmp_path)
    assert len(loaded.adapters) == 14 and torch.equal(answers(loaded), answers(student))
    assert not any("adapter" in key for key in load_file(tmp_path / "model.safetensors"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter: adapter_model.safetensors is missing, damaged"):
        load_student(tmp_path)


@both
def test_a_resumed_run_ends_with_the_same_bits(placement: Any, tmp_path: Path) -> None:
    def run(name: str, steps: int, resume: Path | None = None) -> Student:
        torch.manual_seed(0)
        module, data = make_module(), PackedText("kdqat:prose", seq_len=32, batch_size=2, val_rows=0)
        args = {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": steps, "devices": 1}
        api.bind_data(data, module.build())
        edit = LoraAdapters(placement=placement, dropout=0.3 * (placement == "outside"))
        trainer = api.make_trainer({**args, "callbacks": [edit]}, tmp_path / name)
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        return gather_student(trainer, module)

    whole, _ = run("whole", 3), run("cut", 2)
    resumed = run("cut", 3, tmp_path / "cut" / "checkpoints" / "step=00000002.ckpt")
    states = [student.model.state_dict() for student in (whole, resumed)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_best_weights_are_those_that_are_merged(tmp_path: Path) -> None:
    module, callbacks = make_module(), [LoraAdapters(rank=4), Checkpoints(select="best")]
    trainer = train(module, BATCHES, run=tmp_path, val=BATCHES[:1], callbacks=callbacks, val_check_interval=1)
    for adapter in module.student.adapters.values():  # type: ignore[union-attr]
        torch.nn.init.zeros_(adapter.lora_B)  # as if it had gone downhill since
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    name = "split.model.model.layers.0.mlp.up_proj"
    student = gather_student(trainer, module)
    expected = best[f"{name}.weight"] + 4 * best[f"{name}.adapter.lora_B"] @ best[f"{name}.adapter.lora_A"]
    assert not student.adapters and best[f"{name}.adapter.lora_B"].abs().max() > 0
    torch.testing.assert_close(student.layers[name.removeprefix("split.model.")].weight, expected)


@both
def test_the_shared_teacher_is_a_second_model_to_it(placement: Any) -> None:
    ends = []
    for teacher in (SharedTeacher(), FrozenTeacher(dtype="float32")):
        ends.append(adapted(LoraAdapters(placement=placement), teacher=teacher)[1].model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_the_dequantized_export_holds_the_sum_of_an_adapter_outside(tmp_path: Path) -> None:
    student = trained(None, "outside")
    api.export(student, DequantizedHF(), tmp_path / "out")
    read = loaded(tmp_path / "out")
    assert not any("adapter" in key for key in read.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=IDS).logits, answers(student), rtol=1e-5, atol=1e-5)
    layer = student.layers["model.layers.0.mlp.up_proj"]
    assert torch.equal(read.model.layers[0].mlp.up_proj.weight, layer.dequantized_weight())
    assert not torch.equal(layer.dequantized_weight(), layer.fake_quantized_weight())


def test_an_adapter_on_the_head_counts_in_the_loss(tmp_path: Path) -> None:
    toy_model("llama", tie=False).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    plan = Uniform("W4A16_G32", ignore=[])
    for placement, projects in (("inside", True), ("outside", False)):
        module = make_module(plan=plan, student=ModelSource(str(tmp_path)))
        fit(module, LoraAdapters(placement=placement, roles=["lm_head"]))
        assert module.split is not None and module.split.projects == projects
        head = module.split.model.lm_head
        assert head.adapter.lora_B.abs().max() > 0


@both
def test_peft_loads_the_folder_and_computes_the_same(placement: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = trained(tmp_path / "run", placement)
    if placement == "inside":  # the source with the adapter is the merged student in full precision
        folder, base = tmp_path / "run" / "adapter", ModelSource("toy:llama").load_model()
        with full_precision(student.model):
            expected = answers(student)
    else:  # the dequantized weights with the adapter are the student
        (tmp_path / "student").mkdir()
        save_student(student, tmp_path / "student")
        folder, base = tmp_path / "student" / "adapter", SplitModel(ModelSource("toy:llama").load_model()).model
        for name, layer in student.layers.items():
            base.get_submodule(name).weight.data.copy_(layer.fake_quantized_weight())
        expected = answers(student)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert (model(input_ids=IDS).logits - expected).abs().max() > 1e-3
