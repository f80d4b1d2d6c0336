"""The freezing recipe parses, is planned, and freezes what it says on a toy; the large one parses."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from kdqat.callbacks import Freeze
from kdqat.cli.parser import parse_recipe
from tests.cli.fork_server import ROOT, server


def test_the_recipe_freezes_its_roles_on_a_toy(tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "ohwefreeze" / "smollm2_ov_freeze.yaml")
    overrides = ["--model.student.path", "toy:llama", "--trainer.max_steps", "6", "--data.seq_len", "64",
                 "--trainer.default_root_dir", "run", "--evaluate", "[]", "--export", "[]"]  # fmt: skip
    for verb, *options in (("fit", "--dry_run"), ("quantize",), ("fit",)):
        done = server().run(tmp_path, verb, recipe, *options, *overrides)
        assert done.code == 0, done.err
    assert "Freeze: 4 layers" in done.err and "ZeroGradients" not in done.err
    before, after = (load_file(tmp_path / "run" / part / "quantizers.safetensors") for part in ("prepared", "student"))
    for name in before:
        frozen = name.endswith(("o_proj.scale", "v_proj.scale")) or name.endswith("zero_point")
        assert before[name].equal(after[name]) == frozen, name


def test_the_recipe_of_the_paper_freezes_o_and_v() -> None:
    recipe = parse_recipe(ROOT / "recipes" / "ohwefreeze" / "llama2_7b_chat_w4.yaml")
    (freeze,) = [callback for callback in recipe.trainer["callbacks"] if isinstance(callback, Freeze)]
    assert freeze.roles == ["o", "v"]
