"""The training loop, the DeepSpeed engine, checkpoints, stopping and logs."""
