"""OscillationLog on weights that are moved by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.callbacks import OscillationLog
from kdqat.initializers import RTN
from kdqat.models import layer_refs
from kdqat.quant import MinMax
from kdqat.quant.formats import decode
from kdqat.spec import QuantSpec
from kdqat.student import attach_adapters
from kdqat.training.grid import GridRows, _ranks, grid_rows
from kdqat.training.signals import SignalRecorder
from kdqat.types import LayerRef
from tests.training.toy import make_module

LAYER = "model.layers.0.self_attn.q_proj"


class Bench:
    """One layer whose scale is 1 and whose weights are set by hand, and a log that looks at it."""

    def __init__(self) -> None:
        self.module, self.step = make_module(), 0
        self.module.build()
        self.layer = self.module.student.layers[LAYER]
        self.recorder = SignalRecorder()
        self.log = OscillationLog(every_n_steps=1, max_rows=None)
        self.attach()
        with torch.no_grad():
            self.layer.weight_fake_quantizer.scale.fill_(1)

    def attach(self) -> None:
        self.log._recorder = self.recorder
        self.log._refs = [ref for ref in layer_refs(self.module.student.model) if ref.name == LAYER]

    def moved(self, before: list[float], after: list[float], scale: float = 1.0) -> dict[str, float]:
        """What one step logs that moves the first weights so; all others are 0."""
        trainer = SimpleNamespace(global_step=self.step)
        self._set(before)
        self.layer.weight_fake_quantizer.scale.data.fill_(scale)
        self.log.on_before_optimizer_step(trainer, self.module, None)
        self._set(after)
        self.log.on_train_batch_end(trainer, self.module)
        self.recorder.grid = {}
        self.step += 1
        size = self.layer.weight.numel()
        rows = [row for row in self.recorder.table().to_pylist() if row["step"] == trainer.global_step]
        return {row["metric"]: row["value"] if row["metric"] == "scale_drift" else row["value"] * size for row in rows}

    def _set(self, values: list[float]) -> None:
        with torch.no_grad():
            self.layer.weight.zero_()
            self.layer.weight.view(-1)[: len(values)] = torch.tensor(values)


def test_a_code_that_changes_has_flipped_and_one_that_does_not_has_not() -> None:
    assert Bench().moved([0.4, 0.4, 1.6], [0.6, 0.45, 1.4])["flipped"] == pytest.approx(2)


def test_a_flip_oscillates_if_it_goes_against_that_weights_last_flip_however_long_ago() -> None:
    bench = Bench()
    assert bench.moved([0.4, 0.4, 0.4], [0.6, 0.6, 0.4])["oscillating"] == 0  # the first flips: up
    assert bench.moved([0.6, 0.6, 0.4], [0.6, 0.6, 0.4])["oscillating"] == 0  # none
    numbers = bench.moved([0.6, 0.6, 0.4], [0.4, 1.6, 0.6])  # down, up once more, the first flip of the third
    assert numbers["flipped"] == pytest.approx(3) and numbers["oscillating"] == pytest.approx(1)


def test_near_a_threshold_is_within_a_twentieth_of_a_step_on_both_sides() -> None:
    numbers = Bench().moved([0.46, 0.54, -1.46, 0.44, 0.56, 1.0], [0.0])
    assert numbers["near_threshold"] == pytest.approx(3)


def test_clipped_is_what_lies_beyond_the_last_level_by_more_than_half_a_step() -> None:
    numbers = Bench().moved([7.4, 7.53, 7.6, 20.0, -8.4, -8.6, 7.49], [0.0])
    assert numbers["clipped"] == pytest.approx(4)
    assert numbers["near_threshold"] == pytest.approx(1)  # 7.49; what is clipped is near none


def test_scale_drift_is_in_octaves_from_the_first_scale_and_survives_a_resume() -> None:
    bench = Bench()
    assert bench.moved([0.0], [0.0])["scale_drift"] == 0
    state = bench.log.state_dict()
    bench.log = OscillationLog(every_n_steps=1, max_rows=None)
    bench.attach()
    bench.log.load_state_dict(state)
    assert bench.moved([0.0], [0.0], scale=0.25)["scale_drift"] == pytest.approx(2)


def test_a_log_that_is_used_again_has_new_first_scales() -> None:
    bench = Bench()
    bench.moved([0.0], [0.0])
    bench.log.setup(None, bench.module, "fit")  # type: ignore[arg-type]
    assert bench.moved([0.0], [0.0], scale=0.25)["scale_drift"] == 0


def test_codes_are_of_the_weight_with_the_adapter_inside_of_its_quantizer() -> None:
    bench = Bench()
    attach_adapters(bench.module.student, layers=[LAYER], who="test", rank=1, alpha=1.0)
    with torch.no_grad():
        bench.layer.adapter.lora_A.zero_()[0, 0] = 1
        bench.layer.adapter.lora_B.zero_()[0, 0] = 0.3
    numbers = bench.moved([0.4, 0.4], [0.1, 0.6])  # 0.7 and 0.4 before, 0.4 and 0.6 after
    assert numbers["flipped"] == pytest.approx(2)


def test_directions_begin_anew_when_a_schedule_has_changed_the_bits() -> None:
    bench = Bench()
    bench.moved([0.4], [0.6])
    bench.layer.weight_fake_quantizer.set_bits(8)
    assert bench.moved([0.6], [0.4])["oscillating"] == 0  # on this grid the first flip
    assert bench.moved([0.4], [0.6])["oscillating"] == pytest.approx(1)


def test_directions_of_layers_that_keep_their_bits_are_kept() -> None:
    log, layers = OscillationLog(), tuple(LayerRef(name, 0, "q", ()) for name in "ab")

    def flipped(code: int, highest: list[float]) -> list[float]:
        """The share of each layer's one weight that oscillates when its code becomes 0."""
        one, high = torch.ones(2, 1, 1), torch.tensor(highest).view(2, 1, 1)
        old = GridRows(layers, (1, 1), one, one, (code * one).to(torch.int8), one, high, QuantSpec(format="int4"))
        return log._measured(old, old._replace(codes=torch.zeros_like(old.codes)))["oscillating"].tolist()

    assert flipped(1, [127, 127]) == [0, 0]  # down
    assert flipped(-1, [127, 7]) == [1, 0]  # up
    assert flipped(1, [127, 7]) == [1, 1]


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        *((name, None) for name in ("W4A16_G32", "W4A16", "W8A16_ASYM_G32", "W2A16_G32", "NF4", "MXFP4")),
        *((name, None) for name in ("GGUF_Q4_0", "GGUF_Q4_1")),
        *(("W4A16_G32", 8), ("W8A16_ASYM_G32", 4), ("W4A16_ASYM_G32", 8), ("GGUF_Q4_1", 8)),
    ],
)
def test_codes_are_the_exporters_in_ascending_order_of_their_levels(scheme: str, bits: int | None) -> None:
    module = make_module(plan=Uniform(scheme), quantizer=MinMax, initializer=RTN())
    module.build()
    for layer in module.student.layers.values() if bits else ():
        layer.weight_fake_quantizer.set_bits(bits)  # as a schedule of bits does
    refs = [ref for ref in layer_refs(module.student.model) if ref.name in module.student.layers]
    compared = 0
    for rows in grid_rows(module.split, refs, module.student.layers, None):
        for ref, codes in zip(rows.refs, rows.codes.split(list(rows.counts)), strict=True):
            layer = module.student.layers[ref.name]
            quantizer = layer.weight_fake_quantizer
            levels = decode(quantizer.codes(layer.weight.detach()), quantizer.spec).flatten()
            pairs = torch.stack([codes.flatten().float(), levels]).unique(dim=1)  # in ascending order of my codes
            assert (pairs.diff(dim=1) > 0).all() and pairs.shape[1] > 2
            compared += 1
    assert compared == len(refs)


@pytest.mark.parametrize(("number", "half"), [("int1", True), ("int2", True), ("int8", False), ("e4m3", False)])
def test_codes_of_one_byte_are_in_order_for_every_kind_of_grid(number: str, half: bool) -> None:
    spec = QuantSpec(format=number, zero_point="half") if half else QuantSpec(format=number)
    if spec.number.kind == "integer":
        levels = torch.arange(spec.qrange()[0], spec.qrange()[1] + 1)
    else:
        levels = torch.tensor(spec.number.code_values())
        levels = levels[levels.isfinite()].unique()
    codes = _ranks(levels, spec, levels.min(), levels.max())
    assert codes.dtype == torch.int8 and bool((codes.int().diff() > 0).all())


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="threshold_share lies in"):
        OscillationLog(threshold_share=0.6)
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        OscillationLog(max_rows=0)
