#!/usr/bin/env python3
"""Train: ``deepspeed launch/train.py --ds_config configs/ds/cpu.json [--config RECIPE] [key=value …]``."""

import sys

from pretrain.training.run import main

if __name__ == "__main__":
    sys.exit(main())
