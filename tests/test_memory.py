"""Memory is measured as the system tells it, and where it does not tell, nothing is made up."""

import math
import mmap
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from apexlib.suite import memory
from apexlib.suite.memory import KEEP_FREED, peak_mb, reset_peak, resident_mb

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells it in /proc")


@linux
def test_the_peak_counts_what_was_held_since_it_was_reset(monkeypatch):
    monkeypatch.setattr(memory, "_cuda", lambda: None)  # whose memory would be counted instead
    before = reset_peak()
    with mmap.mmap(-1, 50_000_000) as pages:  # new ones: an array may lie in what was freed before
        np.frombuffer(pages, dtype=np.uint8)[:] = 1
    assert 45 < peak_mb() - before < 80
    assert reset_peak() < before + 30
    assert peak_mb() < before + 40


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is freed, if told to")
def test_what_was_freed_does_not_count():
    code = "from apexlib.suite.memory import reset_peak; before = reset_peak()"
    code += "; b'0' * 200_000_000; print(reset_peak() - before)"
    asked = {"capture_output": True, "text": True, "check": True}
    more = subprocess.run([sys.executable, "-c", code], env=os.environ | {"GLIBC_TUNABLES": KEEP_FREED}, **asked)
    assert float(more.stdout) < 20


@linux
def test_another_process_can_be_asked():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert 0 < resident_mb(child.pid) < resident_mb(os.getpid()) + 200
        child.communicate(b"\n")


def test_what_the_system_does_not_tell_is_nan():
    assert math.isnan(resident_mb(2**31 - 1))
    assert math.isnan(resident_mb(entry="VmNothing"))


def test_measuring_needs_no_torch():
    code = "import sys; from apexlib.suite.memory import peak_mb, reset_peak; reset_peak(); peak_mb()"
    code += "; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
