"""What a training step costs in time and memory, by method: `python -m benchmarks` (see `--help`)."""
