"""Body and head together are the model, to the bit; packed documents do not see each other; vocabularies are cut."""

from __future__ import annotations

import pytest
import torch

from kdqat.losses import ForwardKL
from kdqat.models import SplitModel, cut_vocabulary
from kdqat.models.roles import FAMILIES
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.quant import LSQ, FakeQuantLinear
from kdqat.spec import LayerScheme, QuantSpec
from kdqat.types import Batch

every_family = pytest.mark.parametrize("kind", FAMILIES)
PACKING = [kind for kind, family in FAMILIES.items() if family.packs]


def random_ids(rows: int = 2, tokens: int = 24, vocab: int = 256) -> torch.Tensor:
    return torch.randint(3, vocab, (rows, tokens), generator=torch.Generator().manual_seed(0))


def split(kind: str, **kwargs) -> SplitModel:
    return SplitModel(toy_model(kind, **kwargs)).eval()


@torch.no_grad()
@every_family
@pytest.mark.parametrize("tie", [True, False])
def test_the_head_on_the_body_gives_the_models_own_logits_exactly(kind, tie):
    model, ids = split(kind, tie=tie), random_ids()
    outputs = model(Batch(ids, ids))
    assert outputs.hidden.shape == (2, 24, 64) and outputs.extras == {}
    assert torch.equal(outputs.head(outputs.hidden), model.model(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "change"), [("gemma2", "_soft_cap"), ("cohere", "_scale"), ("granite", "_scale")]
)  # fmt: skip
def test_soft_caps_and_logit_scales_are_part_of_the_head(kind, change):
    model, ids = split(kind), random_ids()
    expected = model.model(input_ids=ids).logits
    setattr(model, change, {"_soft_cap": None, "_scale": 1.0}[change])
    hidden = model(Batch(ids, ids)).hidden
    assert not torch.equal(model.head(hidden), expected)  # the toy would notice if we left it out


def quantized_head(kind: str = "gemma2", **scheme: str) -> SplitModel:
    """With a learned scale in the head, and `scheme` for its activation or output."""
    model = split(kind, tie=False)
    head = LayerScheme(weight=parse_spec("int4"), **{key: parse_spec(text) for key, text in scheme.items()})
    model.model.lm_head = FakeQuantLinear.wrap(model.model.lm_head, head, LSQ)
    torch.nn.init.constant_(model.model.lm_head.weight_fake_quantizer.scale, 0.01)
    return model


def parse_spec(text: str) -> QuantSpec:
    return QuantSpec(format=text, granularity="token", dynamic=True) if text == "int8" else QuantSpec(format=text)


@torch.no_grad()
@every_family
@pytest.mark.parametrize("cut", [None, 200])
def test_the_projection_is_the_head_exactly(kind, cut):
    model, ids = split(kind), random_ids()
    model.vocab_size = cut
    outputs = model(Batch(ids, ids))
    if kind == "bert":  # its head has layers of its own
        assert outputs.projection is None
        return
    weight, bias, transform = outputs.projection()
    logits = torch.nn.functional.linear(outputs.hidden, weight, bias)
    logits = logits if transform is None else transform(logits)
    assert torch.equal(logits, outputs.head(outputs.hidden)) and logits.shape[-1] == (cut or model.num_logits)


def test_a_quantized_heads_projection_has_the_weight_it_computes_with_and_reaches_the_latent_one():
    model, ids = quantized_head(), random_ids()
    head = model.model.lm_head
    projection = model(Batch(ids, ids)).projection()
    assert torch.equal(projection.weight, head.fake_quantized_weight())
    assert not torch.equal(projection.weight, head.weight)
    projection.weight.square().sum().backward()
    assert head.weight.grad.any() and head.weight_fake_quantizer.scale.grad.any()


@pytest.mark.parametrize("tie", [True, False])
def test_a_loss_gives_the_same_gradients_through_the_head_and_through_its_projection(tie):
    student, teacher, ids = split("gemma2", tie=tie), split("llama", vocab_size=256), random_ids()
    student = student if tie else quantized_head()
    student.vocab_size = 256
    batch, gradients = Batch(ids, ids), []
    for projection in (student.projection, None):
        student.zero_grad()
        outputs = student(batch)
        assert outputs.projection is not None
        ForwardKL(chunk_tokens=10)(outputs._replace(projection=projection), teacher(batch), batch).sum.backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})
    for name, ours in gradients[0].items():
        assert (ours - gradients[1][name]).norm() <= 1e-5 * gradients[1][name].norm(), name


def test_a_compiled_loss_sees_one_head_in_all_batches(monkeypatch):
    import kdqat.losses.projected as projected
    from kdqat.losses.chunk import chunk_sums

    torch._dynamo.reset()
    graphs, loss = [], ForwardKL(2.0)
    compiled = torch.compile(chunk_sums, backend=lambda graph, _: graphs.append(1) or graph.forward)
    monkeypatch.setattr(projected, "_compiled_chunk_sums", lambda: compiled)
    student, teacher = split("gemma2"), split("llama")
    student.vocab_size = teacher.vocab_size = 256
    for tokens in (6, 9):
        batch = Batch(random_ids(2, tokens), random_ids(2, tokens))
        outputs, targets = student(batch), teacher(batch)
        expected = loss(outputs, targets, batch).sum
        loss.compile_chunks()
        torch.testing.assert_close(loss(outputs, targets, batch).sum, expected)
    assert graphs == [1]


def test_a_head_that_does_more_than_one_matmul_projects_nothing():
    class Twice(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    ids = random_ids()
    models = [quantized_head(activation="int8"), quantized_head(output="int8"), split("llama"), split("llama")]
    models[2].model.lm_head = Twice(64, 259, bias=False)
    models[3].model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    for model in models:
        assert not model.projects and model(Batch(ids, ids)).projection is None
    assert quantized_head().projects and split("llama").projects


@torch.no_grad()
@every_family
def test_padding_changes_nothing_where_there_are_tokens(kind):
    model, ids = split(kind), random_ids(1, 10)
    alone = model(Batch(ids, ids)).hidden
    padded = torch.nn.functional.pad(ids, (0, 4))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    hidden = model(Batch(padded, padded, attention_mask=mask)).hidden[:, :10]
    torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-5)


def packed(lengths: tuple[int, ...], rows: int = 2) -> Batch:
    ids = random_ids(rows, sum(lengths))
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(rows, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1)
    return Batch(ids, ids, segment_ids=segments, position_ids=positions)


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKING)
def test_documents_packed_into_a_row_compute_as_if_they_were_alone(kind):
    model, lengths = split(kind), (7, 9, 8)
    batch = packed(lengths)
    together = model(batch).hidden
    alone = torch.cat([model(Batch(ids, ids)).hidden for ids in batch.input_ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    leaking = model(Batch(batch.input_ids, batch.labels)).hidden
    assert (leaking[:, :7] - alone[:, :7]).abs().max() < 1e-5 < (leaking[:, 7:] - alone[:, 7:]).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKING)
def test_rows_may_be_packed_differently(kind):
    model = split(kind)
    first, second = packed((7, 9, 8), 1), packed((20, 4), 1)
    batch = Batch(*(torch.cat(pair) if pair[0] is not None else None for pair in zip(first, second, strict=True)))
    for row, alone in enumerate((first, second)):
        torch.testing.assert_close(model(batch).hidden[row], model(alone).hidden[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - set(PACKING)))
def test_a_family_that_cannot_keep_documents_apart_refuses_packed_rows(kind):
    with pytest.raises(ValueError, match="set document_mask/packing to false"):
        split(kind)(packed((7, 9)))


@torch.no_grad()
def test_what_a_loss_wants_comes_with_the_outputs():
    model, ids = split("llama"), random_ids()
    model.use_eager_attention()
    outputs = model(Batch(ids, ids), frozenset({"hidden_states", "attentions"}))
    states, maps = outputs.extras["hidden_states"], outputs.extras["attentions"]
    assert len(states) == 3 and torch.equal(states[-1], outputs.hidden)
    assert [tuple(a.shape) for a in maps] == [(2, 4, 24, 24)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 4, 24))


@torch.no_grad()
@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_padding_rows_of_the_larger_head_are_cut_when_the_tokenizers_agree(larger):
    sizes = {"student": 260, "teacher": 260, larger: 272}
    student, teacher = split("llama", vocab_size=sizes["student"]), split("llama", vocab_size=sizes["teacher"])
    tokenizer = toy_tokenizer()
    text = cut_vocabulary(student, teacher, lambda: (tokenizer, toy_tokenizer()))
    assert text == f"vocabulary: {sizes['student']} student and {sizes['teacher']} teacher logits; 12 padding rows cut"
    ids = random_ids()
    ours, theirs = student(Batch(ids, ids)), teacher(Batch(ids, ids))
    assert ours.head(ours.hidden).shape[-1] == theirs.head(theirs.hidden).shape[-1] == 260
    full = {"student": student, "teacher": teacher}[larger].model(input_ids=ids).logits
    cut = {"student": ours, "teacher": theirs}[larger]
    assert torch.equal(cut.head(cut.hidden), full[..., :260])
    parts = ForwardKL()(ours, theirs, Batch(ids, ids))
    assert parts.sum.isfinite() and parts.sum > 0


def test_equal_sizes_are_left_alone_when_the_tokenizers_agree():
    student, teacher = split("llama"), split("qwen2")
    assert cut_vocabulary(student, teacher, lambda: (toy_tokenizer(), toy_tokenizer())) is None
    assert student.vocab_size is None and teacher.vocab_size is None


def test_a_foreign_tokenizer_of_the_same_size_is_refused():
    ours, theirs = toy_tokenizer(), toy_tokenizer()
    vocab = {token: (i + 1) % 259 for token, i in ours.get_vocab().items()}
    theirs.get_vocab = lambda: vocab
    with pytest.raises(ValueError, match="numbered differently"):
        cut_vocabulary(split("llama"), split("qwen2"), lambda: (ours, theirs))


@pytest.mark.parametrize("change", ["renumbered", "one more", "too many for the cut"])
def test_tokenizers_that_number_tokens_differently_are_refused(change):
    student, teacher = split("llama", vocab_size=260), split("llama", vocab_size=272)
    ours, theirs = toy_tokenizer(), toy_tokenizer()
    if change == "renumbered":
        vocab = {token: (i + 1) % 259 for token, i in ours.get_vocab().items()}
        theirs.get_vocab = lambda: vocab
    elif change == "one more":
        theirs.add_tokens(["<think>"])
    else:
        for tokenizer in (ours, theirs):
            tokenizer.add_tokens(["<a>", "<b>"])  # 261 tokens, and 260 logits of the student
    with pytest.raises(ValueError, match=r"the student has 260 logits .* the teacher 272 .*needs the student's token"):
        cut_vocabulary(student, teacher, lambda: (ours, theirs))
    assert student.vocab_size is None and teacher.vocab_size is None
