"""The parity gate: what is as it should be passes, and the least corruption is named, kept aside and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdqat import api
from kdqat.exporters import DequantizedHF
from kdqat.exporters.parity import ParityError, text_of, verify_export
from kdqat.exporters.parity_logits import TOLERANCES, answers_of, compare_answers, fault_of, tolerance_for
from kdqat.exporters.parity_reader import READERS, CannotRead, ReaderFailed, ask_reader
from tests.contracts.test_exporters import trained

UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def student():
    return trained("toy:llama")


def numbers_in(folder: Path) -> dict:
    return json.loads((folder / "parity.json").read_text())


def ulp(tensor: torch.Tensor, index: int = 5) -> None:
    """The least change of one number."""
    flat = tensor.view(-1)
    flat[index] = torch.nextafter(flat[index], flat[index] + 1)


def flip(tensor: torch.Tensor) -> None:
    """Another code."""
    flat = tensor.view(-1)
    flat[7] ^= 1


def corrupted(cls, file: str, change):
    """`cls`, its `file` changed by `change` after it was written."""

    class Corrupted(cls):
        def export(self, student, out_dir: Path) -> None:
            super().export(student, out_dir)
            tensors = load_file(out_dir / file)
            change(tensors)
            save_file(tensors, out_dir / file, {"format": "pt"})

    return Corrupted()


CODES = {
    "one flipped code": (lambda t: flip(t[f"{GATE}.weight"]), f"{GATE}: 1 of 8192 codes differ, the first at"),
    "one scale off by one ulp": (lambda t: ulp(t[f"{UP}.scale"]), f"{UP}: 1 of 256 scales differ, the first at"),
    "two layers exchanged": (
        lambda t: t.update({f"{UP}.weight": t[f"{GATE}.weight"], f"{GATE}.weight": t[f"{UP}.weight"]}), f"{UP}: "),
    "a layer that is missing": (lambda t: t.pop(f"{UP}.weight"), "the reader read_codes.py failed"),
    "a layer that is not quantized": (lambda t: t.pop(f"{UP}.scale"), f"{UP}: "),
    "a norm scaled by a hundredth": (lambda t: t["model.norm.weight"].mul_(1.01), "model.norm: 64 of 64 weights"),
    "a number that is none": (lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm: 64 of 64 weights differ"),
}  # fmt: skip


@pytest.mark.parametrize("change, says", CODES.values(), ids=CODES.keys())
def test_a_corrupted_file_of_codes_is_rejected_naming_the_first_layer(
    student, codes_file, reader_here, tmp_path, change, says
):
    with pytest.raises(ParityError, match="codes_file is not what the student computes") as error:
        api.export(student, corrupted(codes_file, "codes.safetensors", change), tmp_path / "out")
    assert says in str(error.value) and str(tmp_path / "out.rejected") in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]
    assert (tmp_path / "out.rejected" / "codes.safetensors").is_file()  # nothing is removed
    numbers = numbers_in(tmp_path / "out.rejected")
    assert numbers["rejected"] and not numbers["verified"] and says in numbers["why"]
    assert "REJECTED" in (tmp_path / "out.rejected" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", [f"{UP}.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_one_plain_weight_off_by_one_ulp_is_rejected(student, reader_here, tmp_path, key, dtype):
    exporter = corrupted(in_dtype(dtype), "model.safetensors", lambda tensors: ulp(tensors[key]))
    with pytest.raises(ParityError, match=rf"{key.removesuffix('.weight')}: 1 of \d+ weights differ"):
        api.export(student, exporter, tmp_path / "out")


def in_dtype(kind: str) -> type[DequantizedHF]:
    class InDtype(DequantizedHF):
        def __init__(self) -> None:
            super().__init__(dtype=kind)

    return InDtype


def test_a_rejected_export_leaves_the_earlier_one_as_it_was(student, codes_file, reader_here, tmp_path):
    folder = api.export(student, codes_file(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bad = corrupted(codes_file, "codes.safetensors", lambda t: flip(t[f"{UP}.weight"]))
    for _ in range(2):  # and the second rejected one takes the place of the first
        with pytest.raises(ParityError):
            api.export(student, bad, tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.rejected"]


def test_parity_json_counts_what_was_compared_and_on_what(student, codes_file, reader_here, tmp_path):
    numbers = numbers_in(api.export(student, codes_file(), tmp_path / "out"))
    weights = sum(layer.weight.numel() for layer in student.layers.values())
    assert numbers["verified"] and numbers["why"] is None and numbers["faults"] == []
    assert numbers["codes"] == {"compared": weights, "changed": 0}
    others = sum(t.numel() for name, t in student.model.state_dict().items() if "proj" not in name)
    assert numbers["weights"] == {"compared": weights + others, "changed": 0}
    assert numbers["scales"] == {"compared": weights // 32, "changed": 0}
    assert numbers["logits"]["max_difference"] == 0 and numbers["logits"]["top1"] == 1
    assert numbers["text"]["source"] == "kdqat:prose" and numbers["text"]["shape"] == [4, 128]
    assert len(numbers["text"]["sha256"]) == 64 and numbers["tolerance"]["of"] == "float32"


def test_the_student_is_left_as_it_was(student, reader_here, tmp_path):
    before = {key: value.clone() for key, value in student.model.state_dict().items()}
    student.split.train()
    api.export(student, DequantizedHF(), tmp_path / "out")
    assert student.split.training
    student.split.eval()
    after = student.model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)


def test_activations_are_left_out_on_both_sides_and_put_back(reader_here, tmp_path):
    student = api.quantize("toy:llama", "W4A4_G32", initializer=api.MSEGrid(num_steps=3))
    ids = text_of(student, "kdqat:prose")
    (_, whole), (_, weights) = (answers_of(student, ids, activations=on) for on in (True, False))
    assert (whole - weights).abs().max() > 1e-2
    assert torch.equal(answers_of(student, ids, activations=True)[1], whole)
    numbers = numbers_in(api.export(student, DequantizedHF(), tmp_path / "out"))
    assert numbers["verified"] and numbers["logits"]["max_difference"] == 0
    assert numbers["activations"].startswith("in full precision")


def test_an_encoder_without_a_head_is_compared_by_its_hidden_states(reader_here, tmp_path):
    student = trained("toy:bert_encoder")
    numbers = numbers_in(api.export(student, DequantizedHF(), tmp_path / "out"))
    assert numbers["verified"] and numbers["hidden"]["max_difference"] == 0 and "logits" not in numbers


class Unread(DequantizedHF):
    reader = None


class Uninstalled(DequantizedHF):
    def reader_missing(self) -> str:
        return "it needs nowhere-to-be-found: pip install nowhere-to-be-found"


@pytest.mark.parametrize(
    "exporter, verify, why",
    [(Unread(), True, "no independent reader"), (Uninstalled(), True, "pip install nowhere"),
     (DequantizedHF(), False, "nobody asked")],
)  # fmt: skip
def test_what_cannot_be_verified_is_written_and_says_so(student, tmp_path, caplog, exporter, verify, why):
    folder = api.export(student, exporter, tmp_path / "out", verify=verify)
    numbers = numbers_in(folder)
    assert not numbers["verified"] and not numbers["rejected"] and why in numbers["why"]
    assert why in (folder / "README.md").read_text()
    assert any(why in record.getMessage() for record in caplog.records) == verify


def reader(tmp_path: Path, text: str) -> str:
    (tmp_path / "reader.py").write_text(text)
    return str(tmp_path / "reader.py")


def test_a_reader_that_imports_kdqat_is_no_witness(tmp_path):
    script = reader(tmp_path, "import sys, types\nsys.modules['kdqat'] = types\nopen(sys.argv[3], 'w').close()")
    with pytest.raises(ReaderFailed, match="imported kdqat"):
        ask_reader(script, tmp_path, torch.ones(1, 2, dtype=torch.int64), tmp_path)


@pytest.mark.parametrize("text, error, says", [
    ("raise KeyError('gone')", ReaderFailed, r"failed \(exit code 1\): KeyError: 'gone'"),
    ("pass", ReaderFailed, "it said nothing"),
    ("import sys; print('no such kind', file=sys.stderr); sys.exit(3)", CannotRead, "no such kind"),
])  # fmt: skip
def test_what_a_reader_says_reaches_whoever_asked(tmp_path, text, error, says):
    with pytest.raises(error, match=says):
        ask_reader(reader(tmp_path, text), tmp_path, torch.ones(1, 2, dtype=torch.int64), tmp_path)


def test_a_model_that_the_reader_cannot_read_is_not_verified_and_not_rejected(student, tmp_path, reader_here):
    class Strange(DequantizedHF):
        reader = reader(tmp_path, "import sys; sys.exit(3)")

    (tmp_path / "out").mkdir()
    parity = verify_export(student, Strange(), tmp_path / "out")
    assert not parity.verified and not parity.rejected and "cannot read this model" in parity.why


def test_no_reader_of_the_package_mentions_kdqat_as_a_module():
    for path in READERS.glob("*.py"):
        lines = path.read_text().splitlines()
        assert not [line for line in lines if line.strip().startswith(("import kdqat", "from kdqat"))], path.name


def test_logits_are_judged_by_the_coarser_dtype():
    assert tolerance_for("float32", "bfloat16") == ("bfloat16", TOLERANCES["bfloat16"])
    assert tolerance_for("float16", "float32")[0] == "float16"
    ours = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0)) * 4
    near, far = ours + 5e-3, ours.roll(1, dims=-1)
    shifted = ours.clone()
    shifted[0, 0, 0] += 5e-2
    assert fault_of("logits", compare_answers("logits", ours, near), TOLERANCES["float16"]) is None
    assert "max_difference" in fault_of("logits", compare_answers("logits", ours, shifted), TOLERANCES["float32"])
    for tolerance in TOLERANCES.values():
        assert fault_of("logits", compare_answers("logits", ours, far), tolerance)
