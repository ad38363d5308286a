"""What `python -m train.inspect_data` prints and draws."""
