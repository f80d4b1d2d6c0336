"""A forward pass waits for the device nowhere, and computes what transformers computes."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import masking_utils

from kdqat.models import SplitModel
from kdqat.models.positions import counted_by_the_model, eager_masks_made_there
from kdqat.models.roles import FAMILIES
from kdqat.models.toy import toy_model
from kdqat.types import Batch
from tests.models.waits import Waits

IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
every_family = pytest.mark.parametrize("kind", FAMILIES)


@torch.no_grad()
@every_family
def test_a_pass_over_rows_of_one_document_waits_for_nothing_and_is_what_transformers_computes(kind):
    model = SplitModel(toy_model(kind)).eval()
    with Waits() as waits:
        hidden = model(Batch(IDS, IDS)).hidden
    assert waits.reads == (kind == "gpt2")  # which looks for padding of its own accord, to warn
    assert torch.equal(hidden, model.model.get_submodule(model.family.body)(input_ids=IDS).last_hidden_state)


def test_transformers_looks_for_packed_documents_again_after_a_pass_that_failed():
    looks = masking_utils.find_packed_sequence_indices
    with pytest.raises(KeyError), counted_by_the_model():
        assert masking_utils.find_packed_sequence_indices is not looks
        raise KeyError
    assert masking_utils.find_packed_sequence_indices is looks


def waiting_eager_mask(*args, dtype=torch.float32, **kwargs):
    """As in transformers 5.17."""
    kwargs = {"allow_is_bidirectional_skip": False, **kwargs, "allow_is_causal_skip": False}
    mask = masking_utils.sdpa_mask(*args, **kwargs)
    if mask is not None:
        mask = torch.where(mask, torch.tensor(0.0, device=mask.device, dtype=dtype), torch.finfo(dtype).min)
    return mask


@torch.no_grad()
@every_family
@pytest.mark.parametrize("padded", [False, True])
def test_eager_attention_waits_for_nothing_either_and_is_the_same(kind, padded, monkeypatch):
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setattr(masking_utils, "eager_mask", waiting_eager_mask)
    monkeypatch.setitem(masks._global_mapping, "eager", waiting_eager_mask)
    model = SplitModel(toy_model(kind)).eval()
    model.use_eager_attention()
    batch = Batch(IDS, IDS, torch.ones_like(IDS).index_fill_(1, torch.arange(20, 24), 0) if padded else None)
    with Waits() as before:
        expected = model(batch).hidden
    with eager_masks_made_there(), Waits() as waits:
        hidden = model(batch).hidden
    assert masks["eager"] is waiting_eager_mask
    assert waits.writes < before.writes or (not padded and not model.family.causal)  # which then needs no mask
    assert padded or kind in ("gpt2", "opt") or waits.count == 0  # these two wait of their own accord
    assert torch.equal(hidden, expected)


def test_a_mask_that_waits_for_nothing_is_left_alone():
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    if "torch.tensor(" in inspect.getsource(masking_utils.eager_mask):
        pytest.skip("this transformers' own mask waits")
    with eager_masks_made_there():
        assert masks["eager"] is masking_utils.eager_mask


def test_a_mask_of_somebodys_own_is_left_alone():
    masks, own = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, lambda *args, **kwargs: None
    masks["eager"] = own
    try:
        with eager_masks_made_there():
            assert masks["eager"] is own
        assert masks["eager"] is own
    finally:
        del masks["eager"]
