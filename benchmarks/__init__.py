"""What a training step costs in time and memory, by method: `python -m benchmarks` (see `--help`)."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: the profiler logs each of its starts
