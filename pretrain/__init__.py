"""Medley: pre-training of language encoders on many objectives at once."""

import os
from pathlib import Path

__version__ = "0.1.0"

if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns at every import that it found no GPU
