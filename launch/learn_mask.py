#!/usr/bin/env python3
"""Learn a masking policy on several ranks: ``deepspeed launch/learn_mask.py --ds_config configs/ds/cpu.json …``; the
options are those of ``medley learn-mask meta``."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in train.py

from pretrain.masking.learning.meta import main
from pretrain.training.script import leave

if __name__ == "__main__":
    leave(main)
