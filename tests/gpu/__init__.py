"""Checks of the programs that XLA compiles for NVIDIA GPUs: `make test-gpu-compile`."""
