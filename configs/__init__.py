"""Training configurations: one module each, found by `python -m train.finetune --config NAME`."""
