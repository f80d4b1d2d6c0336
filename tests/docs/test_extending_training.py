"""The examples of docs/extending that need a run or a whole model: callbacks, a data source, a model family."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kdqat
from kdqat import api
from kdqat.data import PackedText
from kdqat.models import FrozenTeacher, SplitModel, layer_refs
from kdqat.models.roles import FAMILIES
from kdqat.models.toy import toy_tokenizer
from kdqat.quant import MinMax
from kdqat.types import Batch
from tests.contracts import test_exporters
from tests.docs.examples import parsed, student


def fitted(out_dir: Path | None, *callbacks: Any, steps: int = 4, **trainer_args: Any) -> Any:
    torch.manual_seed(0)
    data = PackedText("kdqat:prose", seq_len=32, batch_size=2, val_rows=0)
    teacher = FrozenTeacher(dtype="float32")
    args = {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False, **trainer_args}
    return api.fit(student(), data=data, steps=steps, teacher=teacher, callbacks=callbacks, out_dir=out_dir, **args)


def weights_of(trained: Any) -> dict[str, torch.Tensor]:
    return trained.split.state_dict()


def test_the_observer_logs_and_leaves_the_run_bit_identical(example, tmp_path):
    log = example("scale_log").ScaleLog
    without, with_it = (
        weights_of(fitted(tmp_path / name, *cbs)) for name, cbs in (("a", ()), ("b", (log(every_n_steps=2),)))
    )
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    assert "scales/down" in (tmp_path / "b" / "metrics.csv").read_text().splitlines()[0]
    assert "scales/" not in (tmp_path / "a" / "metrics.csv").read_text()


def test_the_steering_callback_freezes_its_roles_inside_its_window_only(example):
    window = example("freeze_window").FreezeWindow
    before = weights_of(student())
    names = [name for name in before if "self_attn.o_proj.weight" in name]
    assert any(name.endswith("quantizer.scale") for name in names)
    frozen = weights_of(fitted(None, window(["o"], start=0, stop=4)))
    thawed = weights_of(fitted(None, window(["o"], start=0, stop=2)))
    for name in before:
        moving = before[name].is_floating_point() and not name.endswith(("zero_point", "qmin", "qmax"))
        assert torch.equal(before[name], frozen[name]) == (name in names or not moving), name
        assert torch.equal(before[name], thawed[name]) == (not moving), name


def test_the_data_source_packs_its_column_and_holds_rows_out(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = ["a page about nothing " * 10, 'with "quotes", commas\nand lines ' * 10]
    lines = ["title,body", *('x,"{}"'.format(text.replace('"', '""')) for text in body)]
    (tmp_path / "notes.csv").write_text("\n".join(lines) + "\n")
    data = parsed("data_source", tmp_path).data
    data.bind(toy_tokenizer(), 512)
    facts = data.describe()
    assert facts["documents"] == 2 and facts["val_rows"] == 1 and facts["train_rows"] > 2
    batch = next(iter(data.train_dataloader()))
    assert batch.input_ids.shape == (2, 32)
    with pytest.raises(ValueError, match="has no column 'text'"):
        example("csv_text").CSVText("notes.csv", seq_len=32).bind(toy_tokenizer())


def test_the_model_family_gives_roles_blocks_body_and_head(example, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr("kdqat.models.roles.FAMILIES", dict(FAMILIES))
    sys.modules.pop("olmo2", None)
    example("olmo2")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("olmo2", **sizes, vocab_size=260, max_position_embeddings=64, pad_token_id=0)
    split = SplitModel(AutoModelForCausalLM.from_config(config)).eval()
    refs = layer_refs(split.model)
    assert sorted(ref.role for ref in refs if ref.block == 1) == sorted(["q", "k", "v", "o", "gate", "up", "down"])
    ids = test_exporters.IDS
    with torch.no_grad():
        outputs = split(Batch(ids, ids))
        assert torch.equal(outputs.head(outputs.hidden), split.model(input_ids=ids).logits)
    plan = api.Uniform("W4A16_G32").allocate(refs)
    assert len(plan) == 14
    kdqat.apply_plan(split.model, plan, MinMax)
