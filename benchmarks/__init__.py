"""What a training step costs in time and memory, by method: `python -m benchmarks` (see `--help`)."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: the profiler logs each of its starts
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # so that compilers are processes of this one, and counted
