"""A stream leaves the model as it found it, holds one block's activations, and says what it cannot do."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from kdqat.calibrate import layer_inputs, stream_blocks
from kdqat.calibrate.capture import capture
from kdqat.quant import fake_quant_layers
from tests.calibrate.toy import names_of, quantized, split_model, text, texts

UP = "model.layers.0.mlp.up_proj"


def state(split: nn.Module) -> list[tuple]:
    """Everything a stream could leave behind."""
    layers = fake_quant_layers(split).values()
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), m.training) for m in split.modules()]
    return [*hooks, *(layer.fake_quantize for layer in layers), torch.is_grad_enabled()]


def in_mixed_modes(split):
    split.train()
    split.model.get_submodule("model.layers.1.mlp").eval()
    fake_quant_layers(split.model)[UP].fake_quantize = False
    return split


@pytest.mark.parametrize("sequential", [False, True])
def test_the_model_is_as_before_at_every_moment_between(sequential):
    split = in_mixed_modes(quantized())
    before = state(split)
    for call in stream_blocks(split, texts(), sequential=sequential):
        assert state(split) == before
        call.run(on_input={name: lambda x: None for name in names_of(split, call.index)})
        assert state(split) == before
    assert state(split) == before


def test_blocks_run_in_eval_mode_and_without_a_graph():
    split, seen = split_model("gpt2").train(), []
    for call in stream_blocks(split, texts(1)):
        name = names_of(split, call.index)[-1]
        call.run(on_output={name: lambda x: seen.append((x.requires_grad, torch.is_grad_enabled()))})
        if call.index == 0:
            first, again = (layer_inputs(call, [name], max_tokens=99)[name] for _ in range(2))
            assert torch.equal(first, again)  # no dropout
    assert seen == [(False, False)] * 3


def test_a_stream_that_is_closed_early_leaves_nothing_and_frees_its_inputs():
    split = in_mixed_modes(quantized())
    before = state(split)
    calls = stream_blocks(split, texts())
    call = next(calls)
    kept = [weakref.ref(x) for x in call.inputs]
    calls.close()
    assert state(split) == before and call.inputs == [] and not any(ref() is not None for ref in kept)
    with pytest.raises(ValueError, match=r"block model\.layers\.0: its inputs are gone"):
        call.run()


def test_a_listener_that_fails_leaves_no_hook():
    split = in_mixed_modes(quantized())
    before = state(split)

    def fail(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        for call in stream_blocks(split, texts()):
            call.run(on_input={UP: fail}, on_output={UP: fail})
    assert state(split) == before


def test_a_forward_pass_that_fails_leaves_no_hook():
    split = in_mixed_modes(quantized())
    before = state(split)
    with pytest.raises(IndexError):
        next(stream_blocks(split, [text()._replace(input_ids=torch.tensor([[10**6]]))]))
    assert state(split) == before


def test_only_one_blocks_inputs_are_held():
    split, batches, alive = split_model(), texts(4), []
    calls = stream_blocks(split, batches)
    call = next(calls)
    assert [x.numel() for x in call.inputs] == [2 * 24 * 64] * 4
    refs = [weakref.ref(x) for x in call.inputs]
    count = lambda: sum(ref() is not None for ref in refs)  # noqa: E731
    handle = call.module.register_forward_pre_hook(lambda *_: alive.append(count()))
    second = next(calls)
    handle.remove()
    assert alive == [4, 3, 2, 1]  # outputs take the place of inputs one by one
    assert count() == 0 and call.inputs == [] and len(second.inputs) == 4
    refs = [weakref.ref(x) for x in second.inputs]
    assert next(calls).inputs == [] and count() == 0  # what lies outside the blocks needs none


def test_masks_and_rotary_tables_are_held_once_for_all_blocks(monkeypatch):
    copies, to = [], torch.Tensor.to

    def copying_to(tensor, *args, **kwargs):  # as if the store were another device
        copies.append(1)
        return to(tensor, *args, **kwargs, copy=True) if args == (torch.device("cpu"),) else to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", copying_to)
    kept = capture(split_model("gemma2"), texts(1), sequential=False, store=torch.device("cpu"), max_tokens=None)
    first, second = (arguments.kwargs["position_embeddings"] for arguments in kept.arguments[0])
    assert copies and first[0] is second[0] and first[1] is second[1]


def test_a_call_is_over_when_the_next_is_asked_for():
    calls = list(stream_blocks(split_model(), texts(1)))
    with pytest.raises(ValueError, match=r"block model\.layers\.1: its inputs are gone, for the next"):
        calls[1].run()
    with pytest.raises(ValueError, match="what lies outside the blocks: its inputs are gone"):
        calls[2].run()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.up_proj", r"'model.layers.1.mlp.up_proj' is not in block model.layers.0"),
        ("mlp.up_proj", "is not in block model.layers.0; give full names"),
        ("model.layers.0.mlp.up_projection", "is not in block"),
    ],
)
def test_a_name_that_is_not_in_the_block_is_refused(name, message):
    calls = stream_blocks(split_model(), texts(1))
    with pytest.raises(ValueError, match=message):
        layer_inputs(next(calls), [name], max_tokens=8)


def test_an_embedding_has_no_layer_inputs():
    for call in stream_blocks(split_model(), texts(1)):
        if call.index is None:
            with pytest.raises(ValueError, match=r"'model\.embed_tokens' is an embedding"):
                call.run(on_input={"model.embed_tokens": print})


def test_a_module_that_is_called_without_hidden_states_is_named():
    for call in stream_blocks(split_model(), texts(1)):
        if call.index is None:
            with pytest.raises(ValueError, match="layer 'model' is not called with hidden states"):
                call.run(on_input={"model": print})


EXPERT = "model.layers.0.mlp.expert"


def with_expert(*, rows: int):
    """The toy with a layer that sees the first `rows` tokens of a micro-batch only."""
    split = split_model()
    mlp = split.model.get_submodule("model.layers.0.mlp")
    mlp.expert = nn.Linear(64, 64)
    if rows:
        mlp.register_forward_hook(lambda _, args, answer: answer + mlp.expert(args[0].flatten(0, 1)[:rows]).sum())
    return split


def test_padding_that_cannot_be_told_from_text_is_an_error_and_packed_text_is_not():
    split, heard = with_expert(rows=5), []
    calls = stream_blocks(split, texts(1))
    next(calls).run(on_input={EXPERT: heard.append})
    assert heard[0].shape == (5, 64)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 20:] = 0
    calls = stream_blocks(split, [text()._replace(attention_mask=mask)])
    with pytest.raises(ValueError, match=rf"layer {EXPERT}: sees 5 rows of a micro-batch of 48"):
        next(calls).run(on_input={EXPERT: heard.append})


def test_a_layer_that_saw_nothing_is_named():
    calls = stream_blocks(with_expert(rows=0), texts(1))
    with pytest.raises(ValueError, match=f"layer {EXPERT}: this layer has seen no input"):
        layer_inputs(next(calls), [EXPERT], max_tokens=8)


@pytest.mark.parametrize(
    ("batches", "max_tokens", "message"),
    [([], None, "not one token"), ([text()], 0, "max_tokens must be at least 1, not 0")],
)  # fmt: skip
def test_no_text_is_an_error(batches, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        next(stream_blocks(split_model(), batches, max_tokens=max_tokens))


def test_blocks_that_are_not_called_in_order_are_refused():
    split = split_model()
    blocks = split.model.get_submodule("model.layers")
    blocks.append(blocks[0])  # one block in two places
    split.model.config.num_hidden_layers = 3
    split.model.config.layer_types = ["full_attention"] * 3
    with pytest.raises(ValueError, match="called once each"):
        next(stream_blocks(split, texts(1)))


def test_a_terminal_sees_a_bar_and_a_log_file_does_not(monkeypatch, capsys):
    list(stream_blocks(split_model(), texts(1)))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: this is a terminal
    list(stream_blocks(split_model(), texts(1)))
    out, err = capsys.readouterr()
    assert out == "" and "calibrating" in err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_stream_waits_in_memory_and_layers_are_heard_on_the_gpu():
    split, mask = split_model("gemma2").cuda(), torch.ones(2, 24, dtype=torch.long)
    mask[0, 20:] = 0
    batches = [*texts(2), text()._replace(attention_mask=mask)]
    for call in stream_blocks(split, batches):
        assert all(x.device.type == "cpu" for x in call.inputs)
        inputs = layer_inputs(call, names_of(split, call.index), max_tokens=1000)
        assert {(x.device.type, len(x)) for x in inputs.values()} == {("cuda", 140)}
