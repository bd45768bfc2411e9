"""What a type checker sees of the public names: their signatures, and that there are no others."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import apexlib
from apexlib.training.methods import METHODS, Name

RIGHT = """
from transformers import PreTrainedModel, TrainingArguments
from apexlib import ApexConfig, ExpansionPlan, activation_statistics, expand, fuse, select, train_in_stages

def use(model: PreTrainedModel, data: list, arguments: TrainingArguments) -> None:
    config = ApexConfig(fraction=0.125, operator="diagonal")
    plan: ExpansionPlan = select(activation_statistics(model, data, top=0.1), config)
    fuse(expand(model, plan, operator="dense", seed=3))
    record = train_in_stages(model, data, arguments, config, method="direct")
    record.plans[0].to_json("plan.json")
"""
WRONG = {  # what a line turns into, and what mypy says
    'operator="dense"': ('operater="dense"', 'Unexpected keyword argument "operater" for "expand"'),
    'method="direct"': ('method="apx"', '"method" to "train_in_stages" has incompatible type'),
    "fraction=0.125": ("fraction=[1]", 'Argument "fraction" to "ApexConfig" has incompatible type'),
    "record.plans": ("record.plan", '"TrainingRecord" has no attribute "plan"'),
    "import ApexConfig": ("import Apexconfig, ApexConfig", 'Module "apexlib" has no attribute "Apexconfig"'),
}
OTHERS = ("torch", "transformers", "pandas", "numpy", "scipy", "einops", "jaxtyping", "tqdm", "accelerate", "pyarrow")
CONFIG = f"""
[mypy]
[mypy-{",".join(f"{name}.*" for name in OTHERS)}]
follow_imports = skip
[mypy-apexlib.*]
follow_imports = silent
"""


@pytest.mark.case("type checkers: a misspelt argument, method or name is an error", "works")
def test_a_type_checker_knows_the_public_names_and_their_arguments(tmp_path):
    (tmp_path / "mypy.ini").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "right.py").write_text(RIGHT, encoding="utf-8")
    for number, (before, (after, _)) in enumerate(WRONG.items()):
        assert RIGHT.count(before) == 1
        (tmp_path / f"wrong_{number}.py").write_text(RIGHT.replace(before, after), encoding="utf-8")
    every = [path.name for path in sorted(tmp_path.glob("*.py"))]
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary", *every]
    asked = {"cwd": tmp_path, "env": os.environ | {"MYPYPATH": str(Path(apexlib.__file__).parent.parent)}}
    said = subprocess.run(command, **asked, capture_output=True, text=True, check=False).stdout
    found = sorted(re.findall(r"^(\w+)\.py:\d+: error: (.*)$", said, flags=re.MULTILINE))
    assert [name for name, _ in found] == [f"wrong_{number}" for number in range(len(WRONG))], said
    for (_, error), (_, expected) in zip(found, WRONG.values(), strict=True):
        assert expected in error


def test_the_names_of_methods_are_those_of_the_registry():
    assert get_args(Name) == tuple(METHODS)
    assert Path(apexlib.__file__).with_name("py.typed").is_file()
