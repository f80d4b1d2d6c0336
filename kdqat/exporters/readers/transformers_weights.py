"""Reads a folder of plain weights with transformers: `python -I transformers_weights.py FOLDER REQUEST ANSWER`.

REQUEST holds `input_ids` [B, T]. ANSWER gets `logits` [B, T, V] float32 (of a model without a head: `hidden`, its last
hidden states) and every tensor of the model as `weights/NAME`, without the suffix `.weight`; what is tied once.
Exit code 3: this reader cannot read such a model at all.
"""

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(folder: str, request: str, answer: str) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    (name,) = config.architectures
    if not hasattr(transformers, name):
        print(f"transformers {transformers.__version__} has no {name}", file=sys.stderr)
        sys.exit(3)
    transformers.AutoTokenizer.from_pretrained(folder)  # whoever serves the folder needs it as well
    model, info = getattr(transformers, name).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], f"transformers says: {info}"
    model.eval()
    with torch.no_grad():
        output = model(**load_file(request), output_hidden_states=True)
    has_logits = "logits" in output
    answers = {"logits" if has_logits else "hidden": output.logits if has_logits else output.hidden_states[-1]}
    answers = {key: value.float().contiguous() for key, value in answers.items()}
    seen = set()
    for key, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            answers[f"weights/{key.removesuffix('.weight')}"] = value.contiguous()
        seen.add(value.data_ptr())
    save_file(answers, answer)


main(*sys.argv[1:])
