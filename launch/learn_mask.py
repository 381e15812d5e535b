#!/usr/bin/env python3
"""Learn a masking policy on several ranks: ``deepspeed launch/learn_mask.py --ds_config configs/ds/cpu.json …``; the
options are those of ``medley learn-mask meta``."""

import logging
import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its store is wordy where rank 0 has gone; we tell it in a line

from pretrain.masking.learning.meta import main

if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as stop:  # --help, or an option that there is not
        code = stop.code if isinstance(stop.code, int) else 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # as in train.py: a thread of gloo may outlive the interpreter, which then aborts
