"""Exporting right after a method is an honest baseline of its name: what is saved is read back with the same bits."""

from __future__ import annotations

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration
from kdqat.initializers import AWQ, GPTQ, QuantoMax, SignRound
from kdqat.models import ModelSource
from kdqat.quant import LSQ
from kdqat.spec import quanto_scheme
from kdqat.student import load_student, prepare_student, save_student

TEXT = Calibration("kdqat:prose", seq_len=32, num_rows=4)
METHODS = {
    "GPTQ": (GPTQ(), "W4A16_G32"),
    "GPTQ-order": (GPTQ(act_order=True, static_groups=True), "W3A16_ASYM_G32"),
    "GPTQ-nested": (GPTQ(), "NVFP4_A16"),
    "AWQ": (AWQ(), "W3A16_ASYM_G32"),
    "SignRound": (SignRound(num_steps=10), "W3A16_ASYM_G32"),
    "QuantoMax": (QuantoMax(), quanto_scheme(4, 64)),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_student_has_the_same_logits_and_codes(name, tmp_path):
    initializer, scheme = METHODS[name]
    student = prepare_student(ModelSource("toy:llama"), Uniform(scheme), LSQ, initializer, calibration=TEXT)
    save_student(student, tmp_path)
    again = load_student(tmp_path)
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(student.model.eval()(ids).logits, again.model.eval()(ids).logits)
    for layer_name, layer in student.layers.items():
        mine, theirs = layer.weight_fake_quantizer, again.layers[layer_name].weight_fake_quantizer
        assert torch.equal(mine.codes(layer.weight), theirs.codes(again.layers[layer_name].weight))
