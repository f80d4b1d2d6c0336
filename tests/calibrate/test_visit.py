"""Blocks go to a device one at a time and come home: a GPU smaller than the model quantizes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdqat.allocate import Uniform
from kdqat.calibrate import Calibration, stream_blocks, visiting
from kdqat.initializers import GPTQ, RTN, MSEGrid
from kdqat.models import ModelSource, SplitModel, blocks_of
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.quant import Fixed, MinMax
from kdqat.student import prepare_student
from tests.calibrate.toy import split_model, texts


class Traveller(nn.Linear):
    """A layer that notes where it is sent instead of going there."""

    def __init__(self, name: str, journey: list[tuple[str, str]]) -> None:
        super().__init__(2, 2)
        self.name, self.journey = name, journey

    def to(self, device):
        self.journey.append((self.name, str(device)))
        return self


def test_modules_are_on_the_device_inside_and_home_again_afterwards_in_the_end_and_after_an_error():
    journey: list[tuple[str, str]] = []
    modules = [Traveller("a", journey), nn.Identity(), Traveller("b", journey)]
    with pytest.raises(KeyError), visiting(modules, "cuda:3"):
        assert journey == [("a", "cuda:3"), ("b", "cuda:3")]
        raise KeyError
    assert journey[2:] == [("b", "cpu"), ("a", "cpu")]


def test_without_a_device_nothing_moves():
    journey: list[tuple[str, str]] = []
    with visiting([Traveller("a", journey)], None):
        pass
    assert not journey


def test_a_stream_takes_each_block_to_the_device_in_its_turn(monkeypatch):
    split, journey = split_model("llama"), []
    for index, block in enumerate(blocks_of(split.model)):
        monkeypatch.setattr(
            block, "to", lambda device, index=index: journey.append((index, str(device))), raising=False
        )
    seen = [(call.index, list(journey)) for call in stream_blocks(split, texts(), device="cpu:0")]
    there = [[(index, "cpu:0")] for index in (0, 1)]
    home = [[(index, "cpu")] for index in (0, 1)]
    assert seen == [(0, there[0]), (1, there[0] + home[0] + there[1]), (None, there[0] + home[0] + there[1] + home[1])]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("initializer", [RTN(), MSEGrid(), GPTQ()], ids=["rtn", "mse", "gptq"])
def test_a_student_prepared_on_the_gpu_is_the_cpus_and_lies_on_the_cpu(initializer):
    def prepare(device):
        torch.manual_seed(0)
        split = SplitModel(toy_model("llama"))
        text = Calibration("kdqat:prose", seq_len=32, num_rows=4)
        quantizer = MinMax if isinstance(initializer, RTN) else Fixed
        return prepare_student(
            ModelSource("toy:llama"), Uniform("W4A16_G32"), quantizer, initializer,
            calibration=text, split=split, tokenizer=toy_tokenizer(), device=device,
        )  # fmt: skip

    here, there = prepare(None), prepare("cuda")
    assert {p.device.type for p in there.model.parameters()} | {b.device.type for b in there.model.buffers()} == {"cpu"}
    for one, other in zip(here.layers.values(), there.layers.values(), strict=True):
        same = (one.fake_quantized_weight() - other.fake_quantized_weight()).abs() < 1e-5
        assert same.float().mean() > 0.98  # a tie may fall the other way
    assert torch.cuda.max_memory_allocated() > 0  # it was there
