"""A layer hears block by block what it hears in a full forward pass, for every family, full-precision or quantized."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from kdqat.calibrate import layer_inputs, stream_blocks
from kdqat.models.roles import FAMILIES
from kdqat.quant import MinMax, apply_plan, fake_quant_layers, full_precision
from kdqat.spec import QuantPlan, preset
from kdqat.types import Batch
from tests.calibrate.toy import assert_same, full_pass, hear, names_of, quantized, split_model, text, texts

every_family = pytest.mark.parametrize("kind", FAMILIES)
WITH_LINEARS = [kind for kind in FAMILIES if kind != "gpt2"]  # GPT-2 has Conv1D, which no plan may name


@every_family
def test_layer_inputs_are_those_of_a_full_forward_pass(kind):
    split, batches = split_model(kind), texts()
    indices = []
    for call in stream_blocks(split, batches):
        names = names_of(split, call.index)
        indices.append(call.index)
        assert_same(hear(call, names), full_pass(split, batches, call.index))
    assert indices == [0, 1, None] and len(names) >= 1


@pytest.mark.parametrize("kind", WITH_LINEARS)
def test_sequential_layer_inputs_are_those_of_the_quantized_model(kind):
    split, batches = quantized(kind), texts()
    for call in stream_blocks(split, batches, sequential=True):
        heard = hear(call, names_of(split, call.index))
        assert_same(heard, full_pass(split, batches, call.index))
        if call.index != 0:  # the toy would notice full-precision inputs
            with full_precision(split), pytest.raises(AssertionError):
                assert_same(heard, full_pass(split, batches, call.index), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", WITH_LINEARS)
def test_otherwise_a_quantized_model_gives_its_full_precision_inputs(kind):
    plain, split, batches = split_model(kind), quantized(kind), texts()
    for call in stream_blocks(split, batches):
        assert_same(hear(call, names_of(split, call.index)), full_pass(plain, batches, call.index))


def test_sequential_passes_on_what_was_changed_while_a_block_was_looked_at():
    split, batches, first = split_model(), texts(), {}
    for call in stream_blocks(split, batches, sequential=True):
        heard = hear(call, names_of(split, call.index))
        assert_same(heard, full_pass(split, batches, call.index))
        if call.index == 0:
            first = full_pass(split, batches, 1)
            split.model.get_submodule("model.layers.0.mlp.down_proj").weight.data.mul_(-3)
        elif call.index == 1:
            with pytest.raises(AssertionError):
                assert_same(heard, first, rtol=1e-3, atol=1e-3)


def test_gptq_practice_is_a_full_precision_block_on_inputs_of_quantized_blocks():
    split, batches, down = quantized(), texts(), "model.layers.1.mlp.down_proj"
    for call in stream_blocks(split, batches, sequential=True):
        if call.index == 1:
            with full_precision(call.module):
                heard = hear(call, [down])[down]
    for name, layer in fake_quant_layers(split.model).items():
        layer.fake_quantize = not name.startswith("model.layers.1.")
    assert torch.equal(heard, full_pass(split, batches, 1)[down])


@pytest.mark.parametrize("sequential", [False, True])
def test_a_quantized_layer_before_the_blocks_is_switched_like_those_inside(sequential):
    split, batches = split_model("opt"), texts()
    split.model.model.decoder.project_in = torch.nn.Linear(64, 64, bias=False)
    plan = QuantPlan({"model.decoder.project_in": preset("W2A16_G64")})
    apply_plan(split.model, plan, MinMax)
    with nullcontext() if sequential else full_precision(split):
        expected = full_pass(split, batches, 0)
    for call in stream_blocks(split, batches, sequential=sequential):
        if call.index == 0:
            assert_same(hear(call, names_of(split, 0)), expected)


@every_family
def test_padding_is_not_heard(kind):
    split, batch, lengths = split_model(kind), text(), (24, 9)
    mask = (torch.arange(24) < torch.tensor(lengths)[:, None]).long()
    padded = batch._replace(attention_mask=mask)
    alone = [Batch(batch.input_ids[i : i + 1, :n], batch.labels[i : i + 1, :n]) for i, n in enumerate(lengths)]
    for call in stream_blocks(split, [padded]):
        heard = hear(call, names_of(split, call.index))
        assert call.num_tokens == sum(lengths)
        assert_same(heard, full_pass(split, alone, call.index), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "phi3"])
def test_packed_documents_stay_apart(kind):
    split, batch, lengths = split_model(kind), text(), (15, 9)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(2, -1)
    packed = batch._replace(segment_ids=segments, position_ids=positions)
    for call in stream_blocks(split, [packed]):
        heard = hear(call, names_of(split, call.index))
        assert_same(heard, full_pass(split, [packed], call.index))
        if call.index == 1:
            with pytest.raises(AssertionError):
                assert_same(heard, full_pass(split, [batch], 1), rtol=1e-3, atol=1e-3)


def test_batches_may_differ_in_shape_and_are_read_once():
    split, batches = split_model("gemma2"), [text(1, 30), text(3, 7)]
    for call in stream_blocks(split, iter(batches)):
        assert_same(hear(call, names_of(split, call.index)), full_pass(split, batches, call.index))


def test_no_further_batch_is_taken_once_there_are_enough_tokens():
    def endless():
        while True:
            yield text()  # 48 tokens

    calls = stream_blocks(split_model(), endless(), max_tokens=100)
    assert next(calls).num_tokens == 144
    calls = stream_blocks(split_model(), endless(), max_tokens=96)
    assert next(calls).num_tokens == 96


def test_a_block_has_a_name_of_its_own_and_so_have_the_modules_in_it():
    split, outputs, attention = split_model(), [], []
    for call in stream_blocks(split, texts()):
        if call.index == 0:
            call.run(on_output={call.prefix: outputs.append}, on_input={f"{call.prefix}.self_attn": attention.append})
        elif call.index == 1:
            assert torch.equal(torch.cat(outputs), torch.cat(call.inputs).flatten(0, 1))
            assert [tuple(x.shape) for x in attention] == [(48, 64)] * 3


def test_layer_inputs_are_chosen_evenly_over_the_text():
    split, batches, name = split_model(), texts(), "model.layers.1.mlp.up_proj"
    everything = full_pass(split, batches, 1)[name]
    for call in stream_blocks(split, batches):
        if call.index == 1:
            few, all_of_them = (layer_inputs(call, [name], max_tokens=n)[name] for n in (12, 1000))
    assert torch.equal(few, everything[::12]) and torch.equal(all_of_them, everything)
    assert few.dtype == torch.float32


def test_a_model_in_half_precision_keeps_half_as_much_and_gives_fp32_samples():
    calls, name = stream_blocks(split_model().bfloat16(), texts()), "model.layers.0.mlp.up_proj"
    call = next(calls)
    assert {x.dtype for x in call.inputs} == {torch.bfloat16}
    assert layer_inputs(call, [name], max_tokens=8)[name].dtype == torch.float32


def test_logits_are_never_made_for_more_than_a_chunk_of_tokens():
    split, batches, chunks = split_model(), [text(3, 400)], []
    for call in stream_blocks(split, batches):
        if call.index is None:
            call.run(on_output={"lm_head": lambda logits: chunks.append(len(logits))})
            heard = hear(call, ["lm_head"])
    assert chunks == [1024, 176]
    assert_same(heard, full_pass(split, batches, None))


def test_a_block_is_replayed_on_its_inputs_or_on_others_and_padding_left_out():
    split, batch = split_model(), text(rows=2, tokens=8)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    stream = stream_blocks(split, [batch._replace(attention_mask=mask)])
    call = next(stream)
    with torch.no_grad():
        output = call.replay(0)
        assert torch.equal(output, call.forward(0)) and not torch.equal(call.replay(0, 2 * call.inputs[0]), output)
    tokens = call.tokens(0, output)
    assert torch.equal(tokens, torch.cat([output[0], output[1, :5]]))
    assert call.replay(0).requires_grad and call.family is split.family
    *_, outside = stream_blocks(split, [batch])
    with pytest.raises(ValueError, match="cannot be replayed"):
        outside.replay(0)
