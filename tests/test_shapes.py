"""Shapes in signatures are true: tests of what has them, run with every annotation of an array checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("beartype", reason="beartype is not installed")
ROOT = Path(__file__).parents[1]
FILES = ("monarch", "fused_ffn", "adapters", "rank_change", "references", "operators_at_work")

WRONG = """
import pytest
import torch
from jaxtyping import TypeCheckError
from apexlib.expansion import expand_rows

def test_a_shape_that_is_wrong_is_refused():
    rows, own = torch.ones(3, 2), {"s": torch.ones(1)}
    expand_rows(rows, lambda source: source, v=torch.ones(1), **own)
    with pytest.raises(TypeCheckError, match="v"):
        expand_rows(rows, lambda source: source, v=torch.ones(1, 1), **own)
"""


def checked(*arguments):
    """Run tests in a process of its own, where annotations are checked by `shapes.checked`."""
    options = ["-q", "-p", "no:cacheprovider", "--jaxtyping-packages=apexlib,shapes.checked"]
    around = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "pytest", *options, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True)


def test_annotations_hold():
    done = checked(*(f"tests/test_{name}.py" for name in FILES), "-k", "not compiling")  # which checks would break up
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-2000:]


def test_an_annotation_that_does_not_hold_is_an_error(tmp_path):
    (tmp_path / "test_wrong.py").write_text(WRONG)
    done = checked(tmp_path / "test_wrong.py")
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-2000:]
