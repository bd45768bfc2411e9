"""Text that is there without a download: the source of Python's standard library and of the installed packages.

The lock pins the packages to one version on every platform, and each distribution lists its own files, so that the same
lock gives the same documents on every machine. Left out are tests, copies of other packages, files that a build writes,
tables, and near-copies: a file is one if half of its lines stand in files before it.
"""

import ast
import functools
import importlib.util
import json
import logging
import re
import sys
import sysconfig
import warnings
from importlib import metadata
from pathlib import Path

from apexlib.files import content_hash
from apexlib.progress import progress
from apexlib.text.cache import cached, corpus_hash, text_hash
from apexlib.text.skills import split_of

PACKAGES = {  # names of distributions
    "python": "accelerate datasets debugpy filelock fonttools fsspec huggingface-hub hypothesis ipykernel ipython jedi "
    "jinja2 jsonschema jupyter-client jupyter-server jupyterlab matplotlib nbclient nbconvert nbformat "
    "packaging pandas papermill parso peft pillow prompt-toolkit pydantic pygments pytest pyyaml requests "
    "rich safetensors setuptools tornado torch tqdm traitlets transformers urllib3",
    "math": "sympy mpmath",  # held out as a whole: for what comes after pre-training
}
EMBEDDED = tuple(f"{name}{kind}" for name in ("stdlib", *PACKAGES) for kind in ("", "-code", "-prose"))

_log = logging.getLogger(__name__)
_SKIPPED_MODULES = {"encodings", "pydoc_data", "turtledemo"}  # character tables; the topics, read below; demos
_TESTS = {"test", "tests", "testing", "idle_test"}
_COPIES = {"_vendor", "vendor", "_vendored", "externals", "third_party"}
_BUILT = re.compile(r"(?:^|/)(?:_?version|__config__|_?build_info|_distributor_init|cuda_config)\.py$")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def embedded(source: str, cache: Path | None = None) -> list[tuple[str, str]]:
    """The documents of an `EMBEDDED` text with their splits, ordered by hash."""
    name, _, kind = source.partition("-")
    modules = _stdlib(Path(sysconfig.get_path("stdlib"))) if name == "stdlib" else _packages(name)
    documents = {} if kind == "prose" else {text: split_of(text) for text in modules.values()}
    if kind != "code":
        key = content_hash("prose", 1, sys.version_info[:3], corpus_hash(modules.values()))
        prose = json.loads(cached(cache, f"{name}-prose", key, lambda: json.dumps(_prose(name, modules)).encode()))
        documents |= {text: part for text, part in prose if text not in documents}
    return sorted(documents.items(), key=lambda document: text_hash(document[0]))


@functools.cache
def _stdlib(root: Path) -> dict[str, str]:
    """Source of each module of the standard library below `root`, by its path there; no tests, no tables."""
    modules, undecodable = {}, 0
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        parts = name.removesuffix(".py").split("/")
        # the interpreter's own list leaves out what an installation adds, such as its build configuration
        if parts[0] not in sys.stdlib_module_names - _SKIPPED_MODULES or _TESTS & set(parts[:-1]):
            continue
        text = _decoded(root / name)
        undecodable += text is None
        if text and text.strip():
            modules[name] = text
    if not modules:
        raise FileNotFoundError(f"{root} holds no Python source: need a standard library in source form, or a file")
    if undecodable:
        _log.warning("stdlib: left out %s undecodable", undecodable)
    return modules


@functools.cache
def _packages(name: str) -> dict[str, str]:
    """Source of the modules of the packages of that name, by their paths among the installed ones."""
    modules, lines_before = {}, set[int]()
    for package in progress(PACKAGES[name].split(), f"reading {name}"):
        try:
            files = metadata.distribution(package).files or ()
        except metadata.PackageNotFoundError:
            raise FileNotFoundError(f"{name}: package {package} is not installed; need those of the lock") from None
        for path, file in sorted((file.as_posix(), file) for file in files if file.suffix == ".py"):
            left_out = _BUILT.search(path) or (_TESTS | _COPIES | {".."}) & set(file.parts[:-1])
            if left_out or not (text := _decoded(Path(file.locate()))):
                continue
            lines = text.splitlines()
            distinct = {hash(line) for each in lines if len(line := each.strip()) > 15}
            if len(distinct) < 5 or max(map(len, lines)) > 1000 or 2 * len(distinct & lines_before) > len(distinct):
                continue
            lines_before |= distinct
            modules[path] = text
    return modules


def _decoded(path: Path) -> str | None:
    try:
        return importlib.util.decode_source(path.read_bytes())  # by its PEP 263 declaration
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def _prose(name: str, modules: dict[str, str]) -> list[tuple[str, str]]:
    """The docstrings of each module, and what else is documented, with their splits."""
    documents, seen = [], {""}
    for text in progress(modules.values(), f"docstrings of {name}"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                nodes = ast.walk(ast.parse(text))
        except (SyntaxError, ValueError):  # templates, and files for another version
            continue
        found = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, _DOCUMENTED))
        valid = (docstring.strip().encode(errors="replace").decode() for docstring in found)  # no lone surrogates
        new = [docstring for docstring in dict.fromkeys(valid) if docstring not in seen]
        seen.update(new)
        if new:  # in the split of its module: else valid prose would stand in train code
            documents.append(("\n\n".join(new), split_of(text)))
    if name == "stdlib":
        from pydoc_data.topics import topics  # of its reference

        further = [topics[each] for each in sorted(topics)]
    else:  # READMEs
        further = [metadata.distribution(package).metadata["Description"] or "" for package in PACKAGES[name].split()]
    return documents + [(text.strip(), split_of(text)) for text in further if text.strip()]
