#!/usr/bin/env python3
"""Train: ``deepspeed launch/train.py --ds_config configs/ds/cpu.json [--config RECIPE] [key=value …]``."""

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its store is wordy where rank 0 has gone; we tell it in a line

from pretrain.errors import EXIT_USER_ERROR
from pretrain.training.run import main

if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as stop:  # --help, or an option that there is not
        code = stop.code if isinstance(stop.code, int) else 1
    if code == EXIT_USER_ERROR and (mark := os.environ.get("MEDLEY_MISTAKE")):
        Path(mark).touch()  # tells a scheduler, which may see the exit code of another rank
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # on a busy machine a thread of gloo may outlive the interpreter, which then aborts
