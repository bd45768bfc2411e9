"""What a notebook declares and what a profile sets, read and checked before anything runs.

A notebook declares its parameters, what it needs and what it writes; a profile says which notebooks belong to a run,
and the values of their parameters.
"""

import ast
import difflib
import json
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

_KINDS: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": bool}
_KINDS |= {"list[int]": list[int], "list[float]": list[float], "list[str]": list[str]}
_FORM = f"need `name: type = literal  # help` with a type of {', '.join(_KINDS)}, or one of them `| None`"
_KINDS |= {f"{name} | None": kind | None for name, kind in _KINDS.items()}

_MOST_YAML = 1_000_000  # bytes
METHODS = ("methods", "falling", "variants")  # parameters that list what is compared


class ReproduceError(ValueError):
    """A run that cannot start: the message names the thing, its value and what is needed instead."""


class Strict(BaseModel):
    """What a file may say: the fields of a subclass, each of its very type, and nothing else."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def validated(model: type[Strict], content: Any, where: str) -> Any:
    """Make a `model` of what stands in a file; what is wrong is said in one line, beginning with `where`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # wrong names come first: they explain why others are missing
        first = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        raise unknown("key", path[-1], model.model_fields, where)
    if first["type"] == "missing":
        raise ReproduceError(f"{where}: need {path[-1]}")
    need = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").replace("greater than", ">")
    if first["type"] in ("model_type", "dict_type"):  # pydantic's words would name our classes
        need = "a mapping" if path else f"a mapping with {', '.join(model.model_fields)}"
    thing = f"{where}, {'.'.join(path)}" if path else where
    raise ReproduceError(f"{thing}: need {need}, got {reprlib.repr(first['input']):.200}")


def unknown(what: str, name: Any, known: Collection[str], where: str = "") -> ReproduceError:
    """Make the error for a name that is not among those `known`; it says which of them is nearest.

    >>> unknown("profile", "smok", ["cpu", "smoke"])
    ReproduceError("unknown profile 'smok': did you mean smoke?")
    """
    near = difflib.get_close_matches(str(name), known, n=1)
    known_ones = f"did you mean {near[0]}?" if near else f"need one of {', '.join(sorted(known)) or 'none'}"
    return ReproduceError(f"unknown {what} {name!r}{where and f' in {where}'}: {known_ones}")


def matching(prefix: str, names: Collection[str]) -> list[str]:
    """Choose the notebooks whose names begin so; at least one does, or ReproduceError is raised."""
    if not (found := [name for name in names if prefix and name.startswith(prefix)]):
        raise unknown("notebook", prefix, names)
    return found


@dataclass(frozen=True)
class Parameter:
    """One line `name: kind = default  # help` of a notebook's parameters cell."""

    name: str
    kind: str
    default: Any
    help: str = ""

    def convert(self, value: Any, where: str = "") -> Any:
        """Return `value` if it is of this parameter's kind, an int as a float where a float is due.

        >>> Parameter("lr", "float | None", 0.1).convert(1)
        1.0
        >>> Parameter("tied", "bool", True).convert("false")
        Traceback (most recent call last):
        apexlib.suite.notebooks.ReproduceError: parameter tied: need bool, got 'false' (str)
        """
        try:
            return TypeAdapter(_KINDS[self.kind], config=Strict.model_config).validate_python(value)
        except ValidationError:
            got = f"{reprlib.repr(value):.200} ({type(value).__name__})"
            raise ReproduceError(f"{where}parameter {self.name}: need {self.kind}, got {got}") from None


def _within_project(path: str) -> str:
    if not path or PurePosixPath(path).is_absolute() or ".." in path.split("/"):
        raise ValueError("paths relative to the project's root")
    return path


def _only_of_tables(writes: dict[str, list[str]]) -> dict[str, list[str]]:
    if any(columns and not path.endswith(".csv") for path, columns in writes.items()):
        raise ValueError("columns of a .csv only")
    return writes


ProjectPath = Annotated[str, AfterValidator(_within_project)]


class _Declaration(Strict):
    """The notebook's metadata `apexlib`; `{profile}` in a path stands for the profile's name; a folder ends in "/"."""

    needs: list[ProjectPath]
    writes: Annotated[dict[ProjectPath, list[str]], AfterValidator(_only_of_tables)]  # with columns of a table
    timeout_minutes: float = Field(gt=0)


class Notebook(_Declaration):
    """A notebook as one profile sees it."""

    name: str
    path: Path
    parameters: dict[str, Parameter]
    cells: tuple[str, ...]  # the code after the parameters
    deciding: tuple[str, ...]  # those that results depend on: all but views, which have the tag "explore"


def read_notebook(path: Path, profile: str) -> Notebook:
    """Read the parameters and declarations of a notebook, with `{profile}` in its paths replaced."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        marked = code and "parameters" in code[0]["metadata"].get("tags", [])
        first, *cells = ["".join(cell["source"]) for cell in code] or [""]
        views = ["explore" in cell["metadata"].get("tags", []) for cell in code[1:]]
        metadata = json.loads(json.dumps(content["metadata"].get("apexlib")).replace("{profile}", profile))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReproduceError(f"{path.name}: need a notebook of format 4 ({type(error).__name__}: {error})") from None
    if not marked:
        raise ReproduceError(f"{path.name}: need the tag 'parameters' on the first code cell")
    declared = validated(_Declaration, metadata, f"{path.name}, metadata apexlib")
    parameters = _parameters(first, f"{path.name}, parameters cell")
    deciding = tuple(cell for cell, is_view in zip(cells, views, strict=True) if not is_view)
    code = {"parameters": parameters, "cells": tuple(cells), "deciding": deciding}
    return Notebook(**dict(declared), name=path.stem, path=path, **code)


def writer_of(path: str, notebooks: Mapping[str, Notebook]) -> str | None:
    """Name the notebook that writes `path`, as such or within a folder."""
    writers = (name for name, each in notebooks.items() if any(_covers(written, path) for written in each.writes))
    return next(writers, None)


def _covers(written: str, path: str) -> bool:
    return path == written or (written.endswith("/") and path.startswith(written))


def _parameters(source: str, where: str) -> dict[str, Parameter]:
    try:
        nodes = ast.parse(source).body
    except SyntaxError as error:
        raise ReproduceError(f"{where}, line {error.lineno}: {error.msg}; {_FORM}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte; brackets too deep
        raise ReproduceError(f"{where}: {error or type(error).__name__}; {_FORM}") from None
    lines, found = source.splitlines(), dict[str, Parameter]()
    for node in nodes:
        here = f"{where}, line {node.lineno}"
        try:
            name, kind, default = node.target.id, ast.unparse(node.annotation), ast.literal_eval(node.value)
            if kind not in _KINDS:
                raise TypeError
        except (AttributeError, TypeError, ValueError, RecursionError, MemoryError):  # it is no annotated literal
            raise ReproduceError(f"{here}: {_FORM}; got `{lines[node.lineno - 1].strip()}`") from None
        if name in found:
            raise ReproduceError(f"{here}: {name} is there already")
        comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()  # columns of `ast` count bytes
        parameter = Parameter(name, kind, default, comment.strip(" #"))
        found[name] = replace(parameter, default=parameter.convert(default, f"{here}, "))
    if [(each.name, each.kind) for each in found.values()][:1] != [("profile", "str")]:
        raise ReproduceError(f'{where}: need `profile: str = "cpu"` as the first parameter')
    return found


class _ProfileFile(Strict):
    """Which notebooks belong to a run, and which of their parameters differ from what is written in them."""

    description: str
    extends: str | None = None  # the profile whose values these go on from
    notebooks: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    runnable: bool = True
    why: str = ""  # said when it is not runnable


class Profile(_ProfileFile):
    name: str  # of its file

    def read_notebooks(self, folder: Path) -> dict[str, Notebook]:
        """Read the notebooks of this profile, no others, in order; each path must have one, earlier, writer."""
        known = [path.stem for path in folder.glob("[0-9][0-9]_*.ipynb")]
        if strange := [name for name in self.notebooks if name not in known]:
            raise unknown("notebook", strange[0], known, f"profile {self.name}")
        notebooks = {name: read_notebook(folder / f"{name}.ipynb", self.name) for name in sorted(self.notebooks)}
        written = [(path, name) for name, notebook in notebooks.items() for path in notebook.writes]
        for (path, writer), (other, name) in combinations(written, 2):
            if name != writer and (_covers(path, other) or _covers(other, path)):
                raise ReproduceError(f"{name} writes {other}, which {writer} writes already")
        for name, notebook in notebooks.items():
            for path in notebook.needs:
                if (writer := writer_of(path, notebooks)) and writer >= name:
                    raise ReproduceError(f"{name} needs {path}, which {writer} writes: need an earlier one")
        return notebooks


class _Plain(yaml.SafeLoader):
    """YAML in which each value stands where it is meant: aliases of aliases make a few lines larger than any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"alias *{event.anchor}, need the value", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")  # YAML 1.1 takes 1e-4 for text, as it has no point
_Plain.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+0123456789"])


def load_yaml(source: Path | str, where: str) -> Any:
    """Read a YAML file, or text, of up to 1 MB, without executing anything in it; an error is one line."""
    if not isinstance(source, str) and (size := source.stat().st_size) > _MOST_YAML:
        raise ReproduceError(f"{where}: {size:,} bytes, need at most {_MOST_YAML:,}")
    try:
        return yaml.load(source if isinstance(source, str) else source.read_text(encoding="utf-8"), _Plain)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ReproduceError(f"{where}: {' '.join(str(error).split())}") from None


def read_profile(profile: str, folder: Path, *, extended_by: tuple[str, ...] = ()) -> Profile:
    """Read the profile of that name in `folder`, or the YAML file of that path; `extended_by` names who asks for it."""
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    path = known.get(profile)
    if profile.endswith((".yaml", ".yml")):
        path = Path(profile)
        if not path.is_file():
            raise ReproduceError(f"profile file {profile}: not found")
        if path.stem in known and not path.samefile(known[path.stem]):
            raise ReproduceError(f"{profile}: the project has a profile {path.stem}, need another file name")
    if path is None:
        raise unknown("profile", profile, known, f"{extended_by[-1]}, extends" if extended_by else "")
    if path.name in extended_by:
        raise ReproduceError(f"{path.name} extends itself: {' → '.join((*extended_by, path.name))}")
    found = validated(_ProfileFile, load_yaml(path, path.name), path.name)
    notebooks = {name: values or {} for name, values in found.notebooks.items()}
    if found.extends is not None:
        base = read_profile(found.extends, folder, extended_by=(*extended_by, path.name)).notebooks
        notebooks = {name: base.get(name, {}) | notebooks.get(name, {}) for name in {**base, **notebooks}}
    if found.runnable and not notebooks:
        raise ReproduceError(f"{path.name}: need both description and notebooks")
    if not found.runnable and not found.why:
        raise ReproduceError(f"{path.name}: need `why`, since it is not runnable")
    return Profile(**dict(found) | {"name": path.stem, "notebooks": notebooks})


def resolve(notebook: Notebook, profile: Profile, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return every parameter's value: the notebook's own, then the profile's, then that of `settings`."""
    values = {name: parameter.default for name, parameter in notebook.parameters.items()}
    for origin, changes in ((f"profile {profile.name}", profile.notebooks), ("--set", settings)):
        where = f"{origin}, {notebook.name}"
        for name, value in changes.get(notebook.name, {}).items():
            if name == "profile":
                raise ReproduceError(f"{where}: parameter profile is set by the runner")
            if name not in notebook.parameters:
                raise unknown("parameter", name, notebook.parameters, where)
            values[name] = notebook.parameters[name].convert(value, f"{where}, ")
    return values | {"profile": profile.name}


def narrowed(
    profile: Profile, notebooks: Iterable[Notebook], named: Collection[str], settings: Mapping[str, Mapping[str, Any]]
) -> Profile:
    """Make the profile in which these `notebooks` compare those methods only that are `named`."""
    fewer = dict(profile.notebooks)
    for notebook in notebooks:
        values = resolve(notebook, profile, settings)
        for key in (key for key in METHODS if key in values):
            if (kept := [each for each in values[key] if each in named]) != values[key]:
                fewer[notebook.name] = fewer[notebook.name] | {key: kept}
    return profile.model_copy(update={"name": f"{profile.name}-claims", "notebooks": fewer})
