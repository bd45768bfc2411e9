"""The site of `make docs`: it builds without a warning, and every public name is on it."""

import re
import subprocess
import sys
from pathlib import Path

import apexlib
from apexlib import plot

ROOT = Path(__file__).parents[1]


def test_the_site_is_built_with_all_public_names(tmp_path):
    command = re.search(r"^docs:.*\n\t\$\(RUN\) (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE).group(1)
    arguments = command.replace("site/", f"{tmp_path}/").split()
    assert "--fail-on-warning" in arguments
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "html"
    pages = {name: (site / "docs" / f"{name}.html").read_text(encoding="utf-8") for name in ("api", "plot", "explore")}
    told = {name for text in pages.values() for name in re.findall(r'id="(apexlib[\w.]*|module-apexlib[\w.]*)"', text)}
    expected = {f"apexlib.{name}" for name in apexlib.__all__} | {f"apexlib.plot.{name}" for name in plot.__all__}
    assert expected - {name.removeprefix("module-") for name in told} == set()
    assert pages["plot"].count("<img") >= 2
    assert "notebooks/" in (site / "index.html").read_text(encoding="utf-8")
