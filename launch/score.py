#!/usr/bin/env python3
"""Score a corpus on several ranks: ``deepspeed launch/score.py --checkpoint RUN --store CORPUS``; the options are those
of ``medley score``."""

import sys

from pretrain.influence.sequential.score import main

if __name__ == "__main__":
    sys.exit(main())
