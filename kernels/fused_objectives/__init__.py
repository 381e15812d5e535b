"""Fused ops for pre-training objectives: corruption, losses and per-sample gradient norms, each a Triton kernel with a
plain-torch twin."""
