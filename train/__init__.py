"""Training: configurations, data, and the one training program `python -m train.finetune`."""
