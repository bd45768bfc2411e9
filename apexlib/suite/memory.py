"""How much memory a process holds, and held at its peak."""

import ctypes
import gc
import math
import re
import sys
from contextlib import suppress
from pathlib import Path

KEEP_FREED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000"
"""GLIBC_TUNABLES of a process that keeps what it frees; the system would clear each product's result anew."""


def resident_mb(process: int | None = None, entry: str = "VmHWM") -> float:
    """Read a size of a living process (default: this one) as Linux tells it, in MB of 10⁶ bytes; NaN elsewhere.

    `entry` is "VmHWM", the peak of resident memory, or "VmRSS", what is resident now.
    """
    with suppress(OSError):
        status = Path(f"/proc/{process or 'self'}/status").read_text(encoding="utf-8")
        if found := re.search(rf"{entry}:\s*(\d+) kB", status):
            return int(found[1]) * 1024 / 1e6
    return math.nan


def reset_peak() -> float:
    """Start measuring the peak of this process anew, where the system can; return what it holds now, in MB.

    On a machine with CUDA, here and in `peak_mb`, memory is what torch holds on the device.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what is here stays: later collections need not look at it
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
        return cuda.memory_allocated() / 1e6
    return resident_mb(entry="VmRSS")


def peak_mb() -> float:
    """Tell the most memory held since `reset_peak`, in MB."""
    cuda = _cuda()
    return cuda.max_memory_allocated() / 1e6 if cuda else resident_mb()


def _cuda():
    """`torch.cuda`, where torch is in use and there is a device."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None
