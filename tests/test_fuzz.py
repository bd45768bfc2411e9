"""Whatever lies in a file: it loads, or is refused in our own words, in time, and nothing in it is executed."""

import os
import subprocess
import sys

import fuzz
import pandas as pd
import pytest


def tried(folder, inputs):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", fuzz.__file__, str(folder), str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(folder / "fuzz.csv", keep_default_na=False)
    assert not table["faulty"].any(), table[table["faulty"] > 0].to_dict("records")
    return table


def test_a_few_damaged_and_hostile_files_of_every_kind(tmp_path):
    assert len(tried(tmp_path, 400)) == 24


@pytest.mark.slow
def test_thousands_of_damaged_and_hostile_files(tmp_path, tally):
    table = tried(tmp_path, 6000)
    inputs = int(table["inputs"].sum())
    assert inputs >= 2000
    what = f"damaged or hostile file for one of {len(table)} loaders"
    tally("files", what, inputs, inputs - int(table["faulty"].sum()))
