"""The core tests under other Pythons and at both ends of the range of transformers: `make test-versions`.

Each Python that is at hand gets an environment that is thrown away; what is not at hand is skipped with a line that
says why. Everything but transformers, and what it pins, has the lock's version.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
TESTS = [f"tests/test_{name}.py" for name in ("architectures", "families", "certificate", "evaluation")]
TESTS += ["tests/test_training.py::test_every_method_trains_and_leaves_a_plain_model"]
TESTS += ["tests/test_training.py::test_arguments_speak_of_the_whole_run_as_the_stock_trainer_takes_them"]
TESTS += ["tests/test_loggers.py"]
NEEDED = ("pytest", "hypothesis", "peft")  # by the tests, beside the library's own dependencies
FREE = ("transformers", "huggingface-hub", "tokenizers")  # of the lock, as transformers pins the others


def requirement(name: str) -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(each for each in map(Requirement, project["dependencies"]) if each.name == name)


def ends(name: str) -> tuple[str, str]:
    """The oldest and the newest release that pyproject.toml allows, as pip takes them."""
    allowed = requirement(name)
    oldest = next(each.version for each in allowed.specifier if each.operator == ">=")
    return f"{name}=={oldest}", str(allowed)


def constraints() -> str:
    """The lock without what is free."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.split("==")[0] not in FREE) + "\n"


def interpreter(version: str) -> str | None:
    """A Python of that version on the path, or among those of pyenv."""
    pyenv = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python"))
    for candidate in (f"python{version}", *map(str, pyenv)):
        try:
            asked = [candidate, "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
            said = subprocess.run(asked, capture_output=True)
        except OSError:
            continue
        if said.stdout.decode().strip() == version:
            return candidate
    return None


def too_large(python: Path, torch: str) -> str:
    """Say why PyTorch is not installed for that Python: there is none, or gigabytes of CUDA come with it."""
    asked = [python, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", "--report", "-", torch]
    told = subprocess.run(asked, capture_output=True, text=True)
    if told.returncode:
        return f"no {torch} at hand"
    (found,) = json.loads(told.stdout)["install"]
    needs = found["metadata"].get("requires_dist", [])
    cuda = any(re.match("nvidia|cuda|triton", each) for each in needs)
    return f"{torch} comes with CUDA here, some gigabytes" if cuda else ""


def main() -> int:
    torch = next(line for line in constraints().splitlines() if line.startswith("torch=="))
    failed = False
    for version in PYTHONS:
        if (own := interpreter(version)) is None:
            print(f"Python {version}: skipped, not at hand")
            continue
        with tempfile.TemporaryDirectory() as folder:
            python, given = Path(folder) / "venv" / "bin" / "python", Path(folder) / "constraints.txt"
            subprocess.run([own, "-m", "venv", Path(folder) / "venv"], check=True)
            if why := too_large(python, torch):
                print(f"Python {version}: skipped, {why}")
                continue
            given.write_text(constraints(), encoding="utf-8")
            for wanted in ends("transformers"):
                start = time.monotonic()
                install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "-c", given]
                subprocess.run([*install, wanted, *NEEDED, "-e", ROOT], check=True)
                around = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
                test = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
                code = subprocess.run(test, cwd=ROOT, env=around).returncode
                failed += bool(code)
                print(
                    f"Python {version}, {wanted}: {'failed' if code else 'passed'} in {time.monotonic() - start:.0f} s"
                )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
