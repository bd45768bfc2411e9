"""Time of steps that take turns, and their peak memory.

Memory is counted in allocations of torch's allocator, not in resident pages: what is counted does not depend on the
machine's malloc, is the same every time, and is what a GPU's allocator reports. The peak of a step is what lives when
it starts (weights, optimizer state, batch) and the largest sum of what it allocates on top. `peak_resident` measures
the pages too, in a process of its own, as a check on that: libraries below torch have buffers of their own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from apexlib.plan import ApexConfig
from apexlib.suite.memory import reset_peak, resident_mb
from benchmarks.breakdown import seconds_by_kind
from benchmarks.workloads import Case, Workload, workload

MIB = 2**20


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Let torch use so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(run: Callable[[], None], device: str = "cpu") -> float:
    """Time one call; on one CPU thread in seconds of that thread's work, which other programs cannot lengthen much."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def taking_turns(runs: Mapping[str, Callable[[], None]], rounds: int, *, device: str = "cpu") -> pd.DataFrame:
    """Time each of `runs` once a round, in an order that rotates, after one call each to warm up.

    One row per round, one column per run, in seconds: what slows the machine for a while slows a whole row.
    """
    names = list(runs)
    for name in names:
        runs[name]()
    rows = []
    for number in range(rounds):
        turn = names[number % len(names) :] + names[: number % len(names)]
        rows.append({name: seconds(runs[name], device) for name in turn})
    return pd.DataFrame(rows, columns=names)


def ratios(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Summarise `taking_turns`: medians, and quartiles of the ratio to `reference` within each round."""
    relative = times.div(times[reference], axis=0)
    low, middle, high = (relative.quantile(share) for share in (0.25, 0.5, 0.75))
    table = {"seconds": times.median(), "ratio": middle, "ratio_low": low, "ratio_high": high, "rounds": len(times)}
    return pd.DataFrame(table).rename_axis("method").reset_index()


def tensor_bytes(work: Workload) -> int:
    """Bytes of all that lives between two steps: parameters, buffers, gradients, optimizer state, inputs."""
    tensors = [*work.model.parameters(), *work.model.buffers(), *work.inputs]
    tensors += [p.grad for p in work.model.parameters() if p.grad is not None]
    tensors += [v for state in work.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def least_bytes(work: Workload, peak: int) -> int:
    """Bytes that a step must move.

    Each weight is read in both passes. Of what trains a gradient is written and read, a weight and AdamW's two moments
    are read and written. What lives at the `peak` beside what lives between steps is written and read.
    """
    weights = sum(p.nbytes for p in work.model.parameters())
    trained = sum(p.nbytes for p in work.model.parameters() if p.requires_grad)
    return 2 * weights + 8 * trained + 2 * (peak - tensor_bytes(work))


def compile_seconds(work: Workload) -> float:
    """CPU time of the first step of a compiled model, with that of the compilers that it starts; no cache helps."""
    before = sum(os.times()[:4])
    with torch.compiler.config.patch(force_disable_caches=True):
        work.step()
    return sum(os.times()[:4]) - before


def peak_of(
    run: Callable[[], object], resident: int, device: str = "cpu", prepare: Callable[[], object] = lambda: None
) -> int:
    """Peak bytes allocated while `run` runs, `resident` of which are there before; what `prepare` allocates counts."""
    return resident + _profiled(run, device, prepare)[0]


def peak_and_kinds(work: Workload, device: str = "cpu") -> tuple[int, dict[str, float]]:
    """Peak bytes of a step, and its seconds by kind of work; the first is another, it makes the optimizer's state."""
    peak, profiler = _profiled(work.step, device)
    return tensor_bytes(work) + peak, seconds_by_kind(profiler, device)


def _profiled(
    run: Callable[[], object], device: str, prepare: Callable[[], object] = lambda: None
) -> tuple[int, profile]:
    """The peak of what a call allocates, and its profile."""
    on_gpu = device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds, profile_memory=not on_gpu, acc_events=True) as profiler:
        prepare()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with record_function("the call"):
            run()
    if on_gpu:
        return torch.cuda.max_memory_allocated() - before, profiler
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "the call")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = np.cumsum([0, *(size for _, size in changes)])[1:]
    before = sum(size for time_ns, size in changes if time_ns < start)
    during = live[[time_ns >= start for time_ns, _ in changes]]
    return int(during.max(initial=before)), profiler


def peak_resident(case: Case, method: str) -> int:
    """Peak bytes of resident pages of two steps, above those before the model exists, in a fresh process (Linux).

    glibc's malloc is told to use one arena and to hand back what is freed, so that pages follow allocations.
    """
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps(asdict(case)), method]
    done = subprocess.run(command, env=os.environ | malloc, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{case.name}, {method}: {done.stderr.strip()[-500:]}")
    return int(done.stdout)


def _measure_resident(case: Case, method: str) -> int:
    tiny = Case("tiny", case.kind, d_model=32, d_ff=64, layers=1, heads=2, vocabulary=64, batch=1, length=8)
    workload(tiny, method).step()  # what is imported or made once is not the step's
    before = resident_mb(entry="VmRSS")
    work = workload(case, method)
    reset_peak()
    for _ in range(2):
        work.step()
    return round(1e6 * (resident_mb() - before))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    print(_measure_resident(Case(**(given | {"config": ApexConfig(**given["config"])})), sys.argv[2]))
