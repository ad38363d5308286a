"""The training run: model, step, processes, checkpoints, what is written."""
