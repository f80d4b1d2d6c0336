"""The five lines of Python of the README, and what they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kdqat
from kdqat import api
from kdqat.student import Student

EVALUATOR: dict[str, Any] = {"seq_len": 32, "limit": 4}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDQAT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def data() -> kdqat.PackedText:
    return kdqat.PackedText("kdqat:prose", seq_len=32, batch_size=2, val_rows=4)


@pytest.fixture
def student() -> Student:
    return kdqat.quantize("toy:llama", "W4A16_G32", initializer=kdqat.RTN())


def fit(student: Student, data: kdqat.PackedText, **arguments: Any) -> Student:
    return kdqat.fit(
        student, data=data, **{"steps": 2, "accelerator": "cpu", "enable_progress_bar": False, **arguments}
    )


def test_the_functions_are_called_as_the_readme_calls_them(student: Student, tmp_path: Path) -> None:
    kdqat.evaluate(student, [kdqat.Perplexity("kdqat:prose", **EVALUATOR)])
    kdqat.export(student, kdqat.DequantizedHF(), tmp_path / "out")


def test_five_lines_of_python(student: Student, data: kdqat.PackedText, tmp_path: Path) -> None:
    trained = fit(student, data, loss=kdqat.ForwardKL())
    evaluators = [kdqat.Perplexity("kdqat:prose", label="ppl", **EVALUATOR),
                  kdqat.TeacherAgreement("kdqat:prose", **EVALUATOR)]  # fmt: skip
    numbers = api.evaluate(trained, evaluators)
    assert set(numbers) == {"ppl", "kdqat:prose"} and numbers["kdqat:prose"]["kl_mean"] > 0
    folder = api.export(trained, kdqat.DequantizedHF(), tmp_path / "out")
    assert (folder / "quant_plan.json").is_file() and (folder / "model.safetensors").is_file()


def test_fit_trains_in_place_and_returns_the_same_student_on_the_cpu(student: Student, data: Any) -> None:
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    assert fit(student, data) is student
    assert not student.split.training
    assert any(not torch.equal(before[name], p) for name, p in student.model.named_parameters())


def test_fit_writes_a_run_directory_only_where_it_is_told_to(
    student: Student, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fit(student, data)
    assert list((tmp_path / "here").iterdir()) == []
    fit(student, data, out_dir=tmp_path / "run", log_every_n_steps=1)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoints", "metrics.csv", "tensorboard"}
    assert list((tmp_path / "here").iterdir()) == []


def test_callbacks_and_trainer_arguments_reach_the_trainer(student: Student, data: Any) -> None:
    import lightning as L

    seen: list[tuple[int, int]] = []

    class Watch(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append((trainer.global_step, trainer.accumulate_grad_batches))

    fit(student, data, callbacks=[Watch()], accumulate_grad_batches=3, steps=4)
    assert seen == [(4, 3)]


def test_the_same_seed_gives_the_same_student(data: Any) -> None:
    first, second = (
        fit(kdqat.quantize("toy:llama", "W3A16_G32"), kdqat.PackedText("kdqat:prose", seq_len=32, val_rows=4))
        for _ in range(2)
    )
    other = second.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.model.state_dict().items())


def test_evaluation_leaves_weights_and_mode_alone(student: Student) -> None:
    student.split.train()
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    api.evaluate(student, [kdqat.Perplexity("kdqat:prose", **EVALUATOR)])
    assert student.split.training
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())


def test_two_evaluators_of_one_name_are_refused(student: Student) -> None:
    evaluators = [kdqat.Perplexity("kdqat:prose"), kdqat.TeacherAgreement("kdqat:prose")]
    with pytest.raises(ValueError, match="two evaluators are called 'kdqat:prose'; give one of them a label"):
        api.evaluate(student, evaluators)


class Refuses(kdqat.DequantizedHF):
    """A format that holds nothing."""

    def refuses(self, student: Student) -> str | None:
        return f"{next(iter(student.plan))} does not fit; use dequantized"


class Breaks(kdqat.DequantizedHF):
    """A format that fails half way."""

    def export(self, student: Student, out_dir: Path) -> None:
        (out_dir / "half").touch()
        raise OSError("disk full")


def test_an_export_refuses_a_plan_it_cannot_hold_and_a_folder_that_exists(student: Student, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"export dequantized: model\.layers\.0\.self_attn\.q_proj does not fit"):
        api.export(student, Refuses(), tmp_path / "out")
    folder = api.export(student, kdqat.DequantizedHF(), tmp_path / "out", verify=False)
    with pytest.raises(ValueError, match="exists already: use --overwrite"):
        api.export(student, kdqat.DequantizedHF(), folder)
    (folder / "old").touch()
    api.export(student, kdqat.DequantizedHF(), folder, overwrite=True, verify=False)
    assert not (folder / "old").exists()


def test_an_export_that_fails_leaves_the_earlier_one(student: Student, tmp_path: Path) -> None:
    folder = api.export(student, kdqat.DequantizedHF(), tmp_path / "out", verify=False)
    with pytest.raises(OSError, match="disk full"):
        api.export(student, Breaks(), folder, overwrite=True, verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (folder / "model.safetensors").is_file() and not (folder / "half").exists()


def test_a_trainer_that_cannot_be_is_a_value_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ValueError, match=r"trainer: .*accelerator"):
        api.make_trainer({"accelerator": "cuda"}, None)


def test_every_public_name_can_be_had() -> None:
    for name in kdqat.__all__:
        assert getattr(kdqat, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kdqat.nothing
