"""Installed packages as a corpus: what is taken, what is left out, what is held out."""

import importlib
import sys

import pytest

from apexlib.text import embedded
from apexlib.text.corpora import load_corpus
from apexlib.text.embedded import PACKAGES

LINES = [f"value_{number} = compute({number}, other={number})" for number in range(20)]


def text_of(lines, docstring=""):
    return "\n".join([f'"""{docstring}"""' * bool(docstring), *lines]) + "\n"


FILES = {
    "lib/first.py": text_of(LINES, "What is computed first."),
    "lib/near.py": text_of(LINES[:12] + [f"another_{n} = something_else({n})" for n in range(8)]),  # 12 of 20 lines
    "lib/other.py": text_of([f"unlike_{n} = something({n}, of='another kind')" for n in range(12)] + LINES[:5]),
    "lib/short.py": "x = 1\n",
    "lib/table.py": text_of([f"row_{n} = {[n] * 400}" for n in range(9)]),
    "lib/version.py": text_of([f"built_{n} = 'by a machine, number {n}'" for n in range(9)]),
    "lib/tests/test_first.py": text_of([f"assert value_{n} == 'what is expected {n}'" for n in range(9)]),
    "lib/_vendor/copied.py": text_of([f"copied_{n} = 'from another package {n}'" for n in range(9)]),
    "lib/damaged.py": None,
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A distribution `lib`, installed below a folder of its own; the only package of the corpus "python"."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\xfe = 1\n" * 9 if text is None else text.encode())
    about = tmp_path / "lib-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lib\nVersion: 1.0\n\nWhat the package is for.\n")
    (about / "RECORD").write_text("".join(f"{name},,\n" for name in FILES) + "../bin/tool.py,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    monkeypatch.setitem(PACKAGES, "python", "lib")
    embedded._packages.cache_clear()
    yield
    embedded._packages.cache_clear()


def everything(source):
    return {text for split in ("train", "valid", "test") for text in load_corpus(source, split=split)}


def test_only_what_people_wrote_in_a_package_itself_is_taken(package):
    assert everything("python-code") == {FILES["lib/first.py"], FILES["lib/other.py"]}
    assert everything("python-prose") == {"What is computed first.", "What the package is for."}
    assert everything("python") == everything("python-code") | everything("python-prose")


def test_the_text_stays_where_the_backport_of_importlib_metadata_is_loaded(package):
    before = everything("python-prose")
    pytest.importorskip("importlib_metadata")  # takes the place of the standard library's, and has another message
    embedded._packages.cache_clear()
    assert everything("python-prose") == before == {"What is computed first.", "What the package is for."}


def test_code_and_docstrings_of_a_module_fall_in_one_split(package):
    (code,) = (
        split for split in ("train", "valid", "test") if FILES["lib/first.py"] in load_corpus("python", split=split)
    )
    assert "What is computed first." in load_corpus("python-prose", split=code)


def test_packages_held_out_are_in_no_other_corpus(monkeypatch):
    assert not set(PACKAGES["python"].split()) & set(PACKAGES["math"].split())
    monkeypatch.setitem(PACKAGES, "math", "mpmath")
    embedded._packages.cache_clear()
    code = everything("math-code")
    embedded._packages.cache_clear()
    assert len(code) > 20
    assert any("def mpf_add" in text for text in code)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(PACKAGES, "math", "mpmath no-such-package")
    embedded._packages.cache_clear()
    with pytest.raises(FileNotFoundError, match="math: package no-such-package is not installed"):
        load_corpus("math")
