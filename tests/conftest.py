"""Where there is no GPU, Triton kernels run in Triton's interpreter; it must be chosen before triton is imported."""

import os
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
