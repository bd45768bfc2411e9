"""What a profile sets: which notebooks belong to a run, and the values of their parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from apexlib.suite.notebooks import Notebook, ReproduceError, Strict, unknown, validated


class _ProfileFile(Strict):
    """Which notebooks belong to a run, and which of their parameters differ from what is written in them."""

    description: str
    extends: str | None = None  # the profile whose values these go on from
    notebooks: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    runnable: bool = True
    why: str = ""  # said when it is not runnable


class Profile(_ProfileFile):
    name: str  # of its file


def load_yaml(source: Path | str, where: str) -> Any:
    """Read a YAML file, or text, without executing anything in it; an error is one line."""
    try:
        return yaml.safe_load(source if isinstance(source, str) else source.read_text(encoding="utf-8"))
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
