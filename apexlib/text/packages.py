"""The installed packages as a corpus: Python source in quantity without a download, and the documentation in it.

The lock pins these packages to one version on every platform, and each distribution lists its own files, so that the
same lock gives the same documents on every machine. Left out are tests, copies of other packages, files that a build
writes, tables, and near-copies: a file is one if half of its lines stand in files before it.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from importlib import metadata

from apexlib.progress import progress

PACKAGES = {  # those of one domain together
    "general": (
        *("accelerate", "datasets", "debugpy", "filelock", "fonttools", "fsspec", "huggingface-hub", "hypothesis"),
        *("ipykernel", "ipython", "jedi", "jinja2", "jsonschema", "jupyter-client", "jupyter-server", "jupyterlab"),
        *("matplotlib", "nbclient", "nbconvert", "nbformat", "packaging", "pandas", "papermill", "parso", "peft"),
        *("pillow", "prompt-toolkit", "pydantic", "pygments", "pytest", "pyyaml", "requests", "rich", "safetensors"),
        *("setuptools", "tornado", "torch", "tqdm", "traitlets", "transformers", "urllib3"),
    ),
    "math": ("sympy", "mpmath"),  # held out as a whole: for what comes after pre-training
}
_SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendor", "_vendored", "externals", "third_party"}
_BUILT = re.compile(r"(?:^|/)(?:_?version|__config__|_?build_info|_distributor_init|cuda_config|_C\w*)\.py$")
_TABLE = 1000  # characters of a line: more are data


def package_sources(domain: str) -> dict[str, str]:
    """Read the Python files of a domain of `PACKAGES`, by `package/path`, in order; no tests, no copies.

    Raises FileNotFoundError where a package is not installed.
    """
    sources, lines_before = {}, set[int]()
    for name, text in progress(_files(PACKAGES[domain]), f"python, {domain}"):
        lines = text.splitlines()
        distinct = {hash(line) for each in lines if len(line := each.strip()) > 15}
        if len(distinct) < 5 or max(map(len, lines)) > _TABLE or 2 * len(distinct & lines_before) > len(distinct):
            continue
        lines_before |= distinct
        sources[name] = text
    return sources


def package_readmes(domain: str) -> list[str]:
    """The description of each package, as its distribution carries it."""
    texts = (metadata.distribution(name).metadata.get_payload() for name in PACKAGES[domain])
    return [text.strip() for text in texts if text.strip()]


def _files(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            raise FileNotFoundError(f"package {package} is not installed: need what requirements.lock names") from None
        for path in sorted(distribution.files or (), key=lambda path: path.as_posix()):
            folders = set(path.parts[:-1])
            if path.suffix != ".py" or ".." in folders or folders & _SKIPPED_FOLDERS or _BUILT.search(path.as_posix()):
                continue
            try:
                yield f"{package}/{path.as_posix()}", importlib.util.decode_source(path.locate().read_bytes())
            except (SyntaxError, UnicodeDecodeError, LookupError):
                continue
