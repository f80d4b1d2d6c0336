"""What every run imports, imported once: `reuse_imports` of a study forks its runs from here.

Only what starts neither CUDA nor threads of its own: whoever imports transformers' models also imports torchao, which
asks for the GPU's capability, and a process in which CUDA was started cannot be forked.
"""

import gguf  # noqa: F401
import tensorboard.summary.writer.event_file_writer  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401

import kdqat.cli.verbs  # noqa: F401
