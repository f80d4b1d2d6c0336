"""What every run imports sooner or later, imported once: `reuse_imports` of a study forks its runs from here.

Nothing here may touch CUDA, start a thread or draw a random number; torchao's remarks about its kernels are kept quiet.
"""

import importlib
import logging

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
for name in (
    "kdqat.cli.verbs",
    "tensorboard.summary.writer.event_file_writer",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)
