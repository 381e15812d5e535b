#!/usr/bin/env python3
"""Train: ``deepspeed launch/train.py --ds_config configs/ds/cpu.json [--config RECIPE] [key=value …]``."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its store is wordy where rank 0 has gone; we tell it in a line

from pretrain.training.run import main
from pretrain.training.script import leave

if __name__ == "__main__":
    leave(main)
