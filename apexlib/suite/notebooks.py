"""What a notebook declares and what a profile sets: read, checked against each other before anything runs."""

import ast
import difflib
import json
import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from apexlib.files import content_hash
from apexlib.suite.folders import folders

_KINDS = ("int", "float", "str", "bool", "list[int]", "list[float]", "list[str]")
_FORM = f"need `name: type = literal  # help` with a type of {', '.join(_KINDS)}, or one of them `| None`"


class ReproduceError(ValueError):
    """A run that cannot start: the message names the thing, its value and what is needed instead."""


@dataclass(frozen=True)
class Parameter:
    """One line `name: kind = default  # help` of a notebook's parameters cell."""

    name: str
    kind: str
    default: Any
    help: str = ""

    def convert(self, value: Any) -> Any:
        """Return `value` if it is of this parameter's kind, an int as a float where a float is due.

        >>> Parameter("lr", "float | None", 0.1).convert(1)
        1.0
        >>> Parameter("tied", "bool", True).convert("false")
        Traceback (most recent call last):
        apexlib.suite.notebooks.ReproduceError: parameter tied: need bool, got 'false' (str)
        """
        try:
            return _as_kind(value, self.kind)
        except TypeError:
            hint = ""
            if "float" in self.kind and isinstance(value, str):
                with suppress(ValueError):
                    float(value)
                    hint = "; YAML takes this for text, need a point and a sign as in 1.0e-4"
            got = f"{value!r} ({type(value).__name__})"
            raise ReproduceError(f"parameter {self.name}: need {self.kind}, got {got}{hint}") from None


@dataclass(frozen=True)
class Notebook:
    """A notebook as one profile sees it; paths are relative to the project's root, a folder's ends in "/"."""

    name: str
    path: Path
    parameters: dict[str, Parameter]
    needs: tuple[str, ...]
    writes: dict[str, tuple[str, ...]]  # path → columns its table must have
    timeout_minutes: float
    source: str  # hash of all code after the parameters, and of what is needed and written; prose is left out
    n_code_cells: int


@dataclass(frozen=True)
class Profile:
    """Which notebooks belong to a run and which parameters differ from those written in the notebooks."""

    name: str
    description: str
    notebooks: dict[str, dict[str, Any]] = field(default_factory=dict)
    runnable: bool = True
    why: str = ""  # said when it is not runnable


def unknown(what: str, name: Any, known: Collection[str], where: str = "") -> ReproduceError:
    """Name something nobody knows, and its nearest relative.

    >>> unknown("profile", "smok", ["cpu", "smoke"])
    ReproduceError("unknown profile 'smok': did you mean smoke?")
    """
    near = difflib.get_close_matches(str(name), known, n=1)
    known_ones = f"did you mean {near[0]}?" if near else f"need one of {', '.join(sorted(known)) or 'none'}"
    return ReproduceError(f"unknown {what} {name!r}{where and f' in {where}'}: {known_ones}")


def read_notebook(path: Path, profile: str) -> Notebook:
    """Read the parameters and declarations of a notebook, with `{profile}` in its paths replaced."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [
            (cell["metadata"].get("tags", []), "".join(cell["source"]))
            for cell in content["cells"]
            if cell["cell_type"] == "code"
        ]
        declared = content["metadata"].get("apexlib")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReproduceError(f"{path.name}: need a notebook of format 4 ({type(error).__name__}: {error})") from None
    if not cells or "parameters" not in cells[0][0]:
        raise ReproduceError(f"{path.name}: need the tag 'parameters' on the first code cell")
    needs, writes, timeout_minutes = _declarations(declared, path.name)
    needs = tuple(name.replace("{profile}", profile) for name in needs)
    writes = {name.replace("{profile}", profile): tuple(columns) for name, columns in writes.items()}
    code = [source for _, source in cells[1:]]
    return Notebook(
        name=path.stem,
        path=path,
        parameters=_parameters(cells[0][1], f"{path.name}, parameters cell"),
        needs=needs,
        writes=writes,
        timeout_minutes=timeout_minutes,
        source=content_hash(code, needs, writes),
        n_code_cells=len(cells),
    )


def read_notebooks(folder: Path, profile: str) -> dict[str, Notebook]:
    """Read all `NN_name.ipynb` of `folder` in their order, and check that each path has one, earlier, writer."""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise ReproduceError(f"{folder}: need at least one notebook NN_name.ipynb")
    notebooks = {path.stem: read_notebook(path, profile) for path in paths}
    seen: list[Notebook] = []
    for notebook in notebooks.values():
        for path in notebook.writes:
            for other in seen:
                if any(_covers(path, written) or _covers(written, path) for written in other.writes):
                    raise ReproduceError(f"{notebook.name} writes {path}, which {other.name} writes already")
        for path in notebook.needs:
            writer = writer_of(path, notebooks.values())
            if writer is not None and writer not in seen:
                raise ReproduceError(f"{notebook.name} needs {path}, which {writer.name} writes: need an earlier one")
        seen.append(notebook)
    return notebooks


def writer_of(path: str, notebooks: Collection[Notebook]) -> Notebook | None:
    """Find the notebook that writes `path`, as such or within a folder."""
    writers = (n for n in notebooks if any(_covers(written, path) for written in n.writes))
    return next(writers, None)


def read_profile(profile: str, folder: Path) -> Profile:
    """Read the profile of that name in `folder`, or the YAML file of that path."""
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    path = known.get(profile)
    if profile.endswith((".yaml", ".yml")):
        path = Path(profile)
        if not path.is_file():
            raise ReproduceError(f"profile file {profile}: not found")
        if path.stem in known and not path.samefile(known[path.stem]):
            raise ReproduceError(f"{profile}: the project has a profile {path.stem}, need another file name")
    if path is None:
        raise unknown("profile", profile, known)
    try:
        folders(path.stem, folder)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ReproduceError(f"{path.name}: {' '.join(str(error).split())}") from None
    fields = {"description": str, "runnable": bool, "why": str, "notebooks": dict}
    content = _mapping(content, path.name)
    for key, value in content.items():
        if key not in fields:
            raise unknown("key", key, fields, path.name)
        if not isinstance(value, fields[key]):
            raise ReproduceError(f"{path.name}, {key}: need {fields[key].__name__}, got {value!r}")
    if "description" not in content or (not content.get("notebooks") and content.get("runnable", True)):
        raise ReproduceError(f"{path.name}: need both description and notebooks")
    if not content.get("runnable", True) and not content.get("why"):
        raise ReproduceError(f"{path.name}: need `why`, since it is not runnable")
    notebooks = {
        name: _mapping(values, f"{path.name}, {name}") for name, values in content.pop("notebooks", {}).items()
    }
    return Profile(name=path.stem, notebooks=notebooks, **content)


def resolve(notebook: Notebook, profile: Profile, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return every parameter's value: the notebook's own, then the profile's, then that of `settings`."""
    values = {name: parameter.default for name, parameter in notebook.parameters.items()}
    of_profile, of_settings = profile.notebooks[notebook.name], settings.get(notebook.name)
    for origin, changes in ((f"profile {profile.name}", of_profile), ("--set", of_settings)):
        for name, value in (changes or {}).items():
            if name == "profile":
                raise ReproduceError(f"{origin}, {notebook.name}: parameter profile is set by the runner")
            if name not in notebook.parameters:
                raise unknown("parameter", name, notebook.parameters, f"{origin}, {notebook.name}")
            try:
                values[name] = notebook.parameters[name].convert(value)
            except ReproduceError as error:
                raise ReproduceError(f"{origin}, {notebook.name}, {error}") from None
    return values | {"profile": profile.name}


def _parameters(source: str, where: str) -> dict[str, Parameter]:
    try:
        nodes = ast.parse(source).body
    except SyntaxError as error:
        raise ReproduceError(f"{where}, line {error.lineno}: {error.msg}; {_FORM}") from None
    lines = source.splitlines()
    found: dict[str, Parameter] = {}
    for node in nodes:
        here = f"{where}, line {node.lineno}"
        parameter = _parameter(node, lines[node.end_lineno - 1])
        if parameter is None:
            raise ReproduceError(f"{here}: {_FORM}; got `{lines[node.lineno - 1].strip()}`")
        if parameter.name in found:
            raise ReproduceError(f"{here}: {parameter.name} is there already")
        try:
            found[parameter.name] = Parameter(
                parameter.name, parameter.kind, parameter.convert(parameter.default), parameter.help
            )
        except ReproduceError as error:
            raise ReproduceError(f"{here}, {error}") from None
    first = next(iter(found.values()), None)
    if first is None or (first.name, first.kind, first.default) != ("profile", "str", "cpu"):
        raise ReproduceError(f'{where}: need `profile: str = "cpu"` as the first parameter')
    return found


def _parameter(node: ast.stmt, last_line: str) -> Parameter | None:
    """Read one annotated literal; None if the statement is anything else."""
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
        return None
    kind = ast.unparse(node.annotation)
    if kind.removesuffix(" | None") not in _KINDS:
        return None
    try:
        default = ast.literal_eval(node.value)
    except ValueError:
        return None
    comment = last_line.encode()[node.end_col_offset :].decode()  # columns of `ast` count bytes
    return Parameter(node.target.id, kind, default, comment.strip(" #"))


def _as_kind(value: Any, kind: str) -> Any:
    if kind.endswith(" | None"):
        return None if value is None else _as_kind(value, kind.removesuffix(" | None"))
    if kind.startswith("list[") and isinstance(value, list):
        return [_as_kind(item, kind[5:-1]) for item in value]
    if kind == "float" and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind != "float" and type(value).__name__ == kind:
        return value
    raise TypeError


def _declarations(declared: Any, where: str) -> tuple[list[str], dict[str, list[str]], float]:
    here = f"{where}, metadata apexlib"
    names = {"needs", "writes", "timeout_minutes"}
    if not isinstance(declared, dict) or set(declared) != names:
        raise ReproduceError(f"{here}: need a mapping with {', '.join(sorted(names))}; got {declared!r}")
    needs, writes, minutes = declared["needs"], declared["writes"], declared["timeout_minutes"]
    if type(minutes) not in (int, float) or not 0 < minutes < math.inf:
        raise ReproduceError(f"{here}: need timeout_minutes > 0, got {minutes!r}")
    if not isinstance(needs, list) or not isinstance(writes, dict):
        raise ReproduceError(f"{here}: need a list of needs and a mapping of writes")
    for path in (*needs, *writes):
        if not isinstance(path, str) or not path or PurePosixPath(path).is_absolute() or ".." in path.split("/"):
            raise ReproduceError(f"{here}: need paths relative to the project's root, got {path!r}")
    for path, columns in writes.items():
        if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
            raise ReproduceError(f"{here}, {path}: need a list of column names, got {columns!r}")
        if columns and not path.endswith(".csv"):
            raise ReproduceError(f"{here}, {path}: columns can be promised of a .csv only")
    return needs, writes, minutes


def _covers(written: str, path: str) -> bool:
    return path == written or (written.endswith("/") and path.startswith(written))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ReproduceError(f"{where}: need a mapping, got {value!r}")
    return value
