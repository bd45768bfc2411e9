"""Run the notebooks of a profile in order, each only if what it depends on changed."""

import argparse
import json
import platform
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from apexlib.files import clear_partial, content_hash, exclusive, file_hash, write_json
from apexlib.provenance import provenance
from apexlib.suite.execution import duration, execute, say, stamps
from apexlib.suite.folders import folders, project_root
from apexlib.suite.ledger import choose, claims_table, measured, read_claims
from apexlib.suite.notebooks import (
    Notebook,
    Profile,
    ReproduceError,
    read_notebook,
    read_notebooks,
    read_profile,
    resolve,
    unknown,
    writer_of,
)

# these decide when a notebook runs, never what it finds: a change in them makes no result stale
_NOT_IN_RESULTS = {"reproduce.py", "execution.py", "notebooks.py", "__main__.py"}
_STATE_FORMAT = 1
_STOPPED = ("failed", "not run")


@dataclass(frozen=True)
class Step:
    """What will become of a notebook (run, maybe, skip), or became of it (the other four), and why."""

    notebook: str
    status: Literal["run", "maybe", "skip", "done", "up to date", "failed", "not run"]
    reason: str = ""


class RunError(RuntimeError):
    """A run in which a notebook failed; `steps` says what became of each."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        super().__init__("\n".join(f"{s.notebook} {s.status}: {s.reason}" for s in steps if s.status in _STOPPED))


def run_profile(
    profile: str = "cpu",
    *,
    root: Path | None = None,
    only: Sequence[str] = (),
    start: str | None = None,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> list[Step]:
    """Run the notebooks of `profile` (a name or a YAML file) whose inputs or results changed since they last ran.

    `only` and `start` are beginnings of notebook names; `settings` maps "notebook.parameter" to a value. Raises
    `ReproduceError` before anything has run, `RunError` after all that does not depend on a failed notebook has.
    """
    job = _Job(profile, root, only=only, start=start, settings=settings or {})
    steps: list[Step] = []
    with job.alone():
        manifest = job.places.results / "manifest.json"
        try:
            for name in job.selected:
                steps.append(job.take_turn(name, steps, force=force))
                say("  ".join(filter(None, (name, steps[-1].status, steps[-1].reason))))
        finally:
            nothing_ran = [step.status for step in steps] == ["up to date"] * len(job.selected)
            if not (nothing_ran and manifest.is_file()):
                write_json(job.manifest(), manifest)
    if any(step.status in _STOPPED for step in steps):
        raise RunError(steps)
    return steps


def plan_profile(
    profile: str = "cpu",
    *,
    root: Path | None = None,
    only: Sequence[str] = (),
    start: str | None = None,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> list[Step]:
    """Tell what `run_profile` would do and why; nothing is run and nothing written."""
    job = _Job(profile, root, only=only, start=start, settings=settings or {})
    steps: list[Step] = []
    for name in job.selected:
        moving = [step.notebook for step in steps if step.status != "skip"]
        upstream = [path for path in job.notebooks[name].needs if job.writer(path) in moving]
        if reason := "forced" if force else job.stale(job.notebooks[name]):
            steps.append(Step(name, "run", reason))
        elif upstream:
            steps.append(Step(name, "maybe", f"if {job.writer(upstream[0])} changes {upstream[0]}"))
        else:
            steps.append(Step(name, "skip", "up to date"))
    return steps


def notebooks_of_claims(numbers: Sequence[int], profile: str, root: Path) -> list[str]:
    """Name the notebooks that claims of the ledger need, with all those whose results these need."""
    known = read_notebooks(root / "notebooks", read_profile(profile, root / "notebooks" / "profiles").name)
    try:
        claims = choose(read_claims(root / "data" / "claims.yaml"), numbers)
    except (OSError, ValueError) as error:
        raise ReproduceError(str(error)) from None
    found, wanted = set(), [name for claim in claims for name in claim.notebooks]
    while wanted:
        if (name := wanted.pop()) not in known:
            raise unknown("notebook", name, known, "data/claims.yaml")
        if name not in found:
            found.add(name)
            wanted += [writer.name for path in known[name].needs if (writer := writer_of(path, known.values()))]
    return sorted(found)


class _Ledger:
    """What earlier runs left behind: per notebook its inputs and its record, per file the hash last seen."""

    def __init__(self, root: Path, path: Path) -> None:
        self.root, self.path = root, path
        self.notebooks: dict[str, dict[str, Any]] = {}
        self.files: dict[str, list[Any]] = {}
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] == _STATE_FORMAT and _is_ledger(stored["notebooks"], stored["files"]):
                self.notebooks, self.files = stored["notebooks"], stored["files"]

    def save(self) -> None:
        write_json({"format": _STATE_FORMAT, "notebooks": self.notebooks, "files": self.files}, self.path)

    def hash(self, path: str) -> str | None:
        """Hash a file, or names and contents of a folder; None if there is none.

        Bytes are read only if size or time of change differ from those last seen.
        """
        found = stamps(self.root, path)
        for name, stamp in found.items():
            if self.files.get(name, [])[:-1] != stamp:
                self.files[name] = [*stamp, file_hash(self.root / name)]
        hashes = {name: self.files[name][-1] for name in found}
        return (content_hash(hashes) if path.endswith("/") else hashes[path]) if hashes else None


def _is_ledger(notebooks: Any, files: Any) -> bool:
    """Whether these are what a ledger holds; what a damaged file holds counts as nothing, and its notebooks run."""
    maps = [notebooks, files, *notebooks.values()]
    for past in filter(None, notebooks.values()):
        maps += [past["inputs"], past["record"], past["record"]["artifacts"]]
    return all(isinstance(each, dict) for each in maps) and all(isinstance(seen, list) for seen in files.values())


class _Job:
    """One run as it was asked for: everything is read and checked before anything starts."""

    def __init__(
        self, profile: str, root: Path | None, *, only: Sequence[str], start: str | None, settings: Mapping[str, Any]
    ) -> None:
        self.root = _root(root)
        self.profile = _runnable(read_profile(profile, self.root / "notebooks" / "profiles"))
        self.places = folders(self.profile.name, self.root)
        self.notebooks = read_notebooks(self.root / "notebooks", self.profile.name)
        for name in self.profile.notebooks:
            if name not in self.notebooks:
                raise unknown("notebook", name, self.notebooks, f"profile {self.profile.name}")
        names = [name for name in self.notebooks if name in self.profile.notebooks]
        self.selected = names
        if only:
            wanted = {name for prefix in only for name in _matching(prefix, names)}
            self.selected = [name for name in names if name in wanted]
        elif start is not None:
            self.selected = names[names.index(_matching(start, names)[0]) :]
        self.settings: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            prefix, _, parameter = key.partition(".")
            for name in _matching(prefix, self.selected):
                self.settings.setdefault(name, {})[parameter] = value
        for name in names:
            resolve(self.notebooks[name], self.profile, self.settings)
        for name in self.selected:
            self._check_needs(self.notebooks[name])
        self.ledger = _Ledger(self.root, self.places.runs / "state.json")

    def _check_needs(self, notebook: Notebook) -> None:
        for path in notebook.needs:
            writer = self.writer(path)
            if writer in self.selected or stamps(self.root, path):
                continue
            missing = f"{notebook.name} needs {path}, which is missing"
            if writer is None:
                raise ReproduceError(f"{missing} and which no notebook writes")
            if writer not in self.profile.notebooks:
                raise ReproduceError(f"{missing}: {writer} writes it, but is not in profile {self.profile.name}")
            raise ReproduceError(f"{missing}: {writer} writes it, run that too (--from {writer[:2]})")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one runner at a time work on a profile; what the one before has left is read once it is gone."""
        with ExitStack() as held:
            try:
                held.enter_context(exclusive(self.places.runs / ".lock"))
            except BlockingIOError:
                raise ReproduceError(f"profile {self.profile.name}: another run of it has not ended yet") from None
            for folder in (self.places.results, self.places.figures, self.places.models, self.places.runs):
                clear_partial(folder)
            self.ledger = _Ledger(self.root, self.ledger.path)
            try:
                yield
            finally:
                self.ledger.save()

    def writer(self, path: str) -> str | None:
        """Name the notebook that writes `path`."""
        writer = writer_of(path, self.notebooks.values())
        return writer.name if writer else None

    def inputs(self, notebook: Notebook) -> dict[str, Any]:
        """Collect everything the notebook's results depend on, under names that a user knows."""
        library = sorted((self.root / "apexlib").rglob("*.py"))
        sources = [path.relative_to(self.root).as_posix() for path in library if path.name not in _NOT_IN_RESULTS]
        values = resolve(notebook, self.profile, self.settings)
        return {
            "source": notebook.source,
            **{f"parameter {name}": value for name, value in values.items()},
            **{path: self.ledger.hash(path) for path in (*notebook.needs, *sources, "requirements.lock")},
            "Python": platform.python_version(),
        }

    def stale(self, notebook: Notebook) -> str:
        """Say why the notebook has to run; "" if its results are up to date."""
        past = self.ledger.notebooks.get(notebook.name)
        if past is None:
            return "never run"
        if not past:
            return "the last run did not finish"
        old, new = past["inputs"], self.inputs(notebook)
        if changed := [key for key in {**new, **old} if old.get(key, ...) != new.get(key, ...)]:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return f"changed: {', '.join(changed[:3])}{more}"
        for path, written in past["record"]["artifacts"].items():
            if (found := self.ledger.hash(path)) != written:
                return f"{'missing' if found is None else 'not as it was written'}: {path}"
        return ""

    def take_turn(self, name: str, steps: Sequence[Step], *, force: bool) -> Step:
        """Run one notebook, unless it is up to date or needs what a failed one writes."""
        try:
            # read once more, since it may have been edited while those before it ran
            notebook = read_notebook(self.notebooks[name].path, self.profile.name)
            stopped = [step.notebook for step in steps if step.status in _STOPPED]
            if blocked := [writer for path in notebook.needs if (writer := self.writer(path)) in stopped]:
                return Step(name, "not run", f"needs {blocked[0]}")
            reason = "forced" if force else self.stale(notebook)
            inputs = self.inputs(notebook)
        except ReproduceError as error:
            return Step(name, "failed", str(error))
        for path in notebook.needs:
            writer = self.writer(path)
            unasked = writer in self.profile.notebooks and writer not in self.selected
            if unasked and (why := self.stale(self.notebooks[writer])):
                say(f"{name}  note: {path} is out of date, {writer}: {why}")
        if not reason:
            return Step(name, "up to date")
        say(f"{name}  start: {reason}")
        self.ledger.notebooks[name] = {}  # stays so unless the notebook finishes
        self.ledger.save()
        made_with = provenance()
        values = resolve(notebook, self.profile, self.settings)
        copy = self.places.runs / notebook.path.name
        execution = execute(notebook, values, root=self.root, copy=copy)
        if execution.problem:
            return Step(name, "failed", f"{execution.problem}\n  as far as it got: {copy}")
        artifacts = {path: self.ledger.hash(path) for path in notebook.writes}
        record = {
            **{key: made_with[key] for key in ("created", "commit", "source_modified")},
            **_table_facts(artifacts, self.root),
            "parameters": values,
            "artifacts": artifacts,
            "seconds": round(execution.seconds, 1),
            "peak_memory_mb": execution.peak_memory_mb,
        }
        self.ledger.notebooks[name] = {"inputs": inputs, "record": record}
        self.ledger.save()
        memory = f", {execution.peak_memory_mb} MB" if execution.peak_memory_mb else ""
        return Step(name, "done", f"{duration(execution.seconds)}{memory}")

    def manifest(self) -> dict[str, Any]:
        """Tell what was run with what, for every notebook of the profile whose results are complete."""
        past = {name: self.ledger.notebooks.get(name) for name in self.profile.notebooks}
        facts = provenance(
            profile=self.profile.name, notebooks={name: entry["record"] for name, entry in past.items() if entry}
        )
        del facts["device"]  # that of this process, which computes nothing; each notebook's is in its entry
        return facts


def _root(root: Path | None) -> Path:
    """Find the project around the working directory, else the one this file belongs to."""
    if root is not None:
        return Path(root).resolve()
    with suppress(FileNotFoundError):
        return project_root()
    try:
        return project_root(Path(__file__).parent)
    except FileNotFoundError as error:
        raise ReproduceError(str(error)) from None


def _runnable(profile: Profile) -> Profile:
    if not profile.runnable:
        raise ReproduceError(f"profile {profile.name} is not run here: {' '.join(profile.why.split())}")
    return profile


def _matching(prefix: str, names: Collection[str]) -> list[str]:
    found = [name for name in names if prefix and name.startswith(prefix)]
    if not found:
        raise unknown("notebook", prefix, names)
    return found


def _table_facts(artifacts: Mapping[str, str | None], root: Path) -> dict[str, Any]:
    """Collect data hashes and devices from the JSON beside each table, where it is about that very table."""
    tables = {}
    for path, sha256 in artifacts.items():
        facts_file = (root / path).with_suffix(".json")
        if path.endswith(".csv") and facts_file.is_file():
            facts = json.loads(facts_file.read_text(encoding="utf-8"))
            if facts.get("sha256") == sha256:
                tables[path] = facts
    devices = sorted({facts["device"] for facts in tables.values() if "device" in facts})
    return {
        "data": {path: facts["data"] for path, facts in tables.items() if "data" in facts},
        "device": ", ".join(devices) or None,
    }


def _listing(profile: str) -> Iterator[str]:
    """Describe all profiles, and the notebooks and parameters of one."""
    root = _root(None)
    folder = root / "notebooks" / "profiles"
    for path in sorted(folder.glob("*.yaml")):
        known = read_profile(path.stem, folder)
        yield f"profile {known.name:<8}  {known.description}{'' if known.runnable else ' (not run here)'}"
    chosen = read_profile(profile, folder)
    for name, notebook in read_notebooks(root / "notebooks", chosen.name).items():
        if name in chosen.notebooks:
            values = resolve(notebook, chosen, {})
            yield f"\n{name}  writes {', '.join(notebook.writes) or 'nothing'}"
            for parameter in notebook.parameters.values():
                help_text = f"  # {parameter.help}" if parameter.help else ""
                yield f"  {parameter.name}: {parameter.kind} = {values[parameter.name]!r}{help_text}"


def _show_verdicts(numbers: Sequence[int], profile: str, root: Path) -> int:
    """Print claims as the results of a profile decide them; 1: a table is not what it should be."""
    results = folders(read_profile(profile, root / "notebooks" / "profiles").name, root).results
    try:
        table = claims_table(results, only=numbers, claims=read_claims(root / "data" / "claims.yaml"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in table.itertuples():
        print(f"claim {row.number}: {row.statement}")
        print(f"  the paper  {row.expected}")
        print(f"  here       {measured(row)}; {row.rule}; seeds: {row.n}")
        print(f"  verdict    {row.verdict}")
        print(f"  limits     {row.limits}")
    return 0


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise ReproduceError(f"--set {text}: need NOTEBOOK.PARAMETER=VALUE")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ReproduceError(f"--set {text}: {' '.join(str(error).split())}") from None
    return settings


def _terminate(*_: Any) -> None:
    raise KeyboardInterrupt("SIGTERM")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code.

    0: all went well; 1: a notebook failed, or the runner could not write; 2: nothing was started; 130 or 143:
    interrupted by SIGINT or SIGTERM.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    parser = argparse.ArgumentParser(prog="python -m apexlib reproduce", description="Run the notebooks of a profile.")
    parser.add_argument("--profile", default="cpu", help="a name from notebooks/profiles, or a YAML file of your own")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", action="append", default=[], metavar="01", help="just this notebook (repeatable)")
    which.add_argument("--from", dest="start", metavar="01", help="this notebook and all after it")
    which.add_argument(
        "--claim", type=int, action="append", default=[], metavar="3", help="what this claim needs (repeatable)"
    )
    parser.add_argument("--force", action="store_true", help="run them even if nothing changed")
    parser.add_argument("--set", action="append", default=[], metavar="01.NAME=VALUE", help="a parameter (repeatable)")
    parser.add_argument("--dry-run", action="store_true", help="tell what would run and why; run nothing")
    parser.add_argument("--list", action="store_true", help="show profiles, notebooks and parameters")
    given = parser.parse_args(arguments)
    try:
        if given.list:
            print(*_listing(given.profile), sep="\n")
            return 0
        if given.claim:
            given.only = notebooks_of_claims(given.claim, given.profile, _root(None))
        chosen = {"only": given.only, "start": given.start, "force": given.force, "settings": _settings(given.set)}
        if not given.dry_run:
            run_profile(given.profile, **chosen)
            return _show_verdicts(given.claim, given.profile, _root(None)) if given.claim else 0
        steps = plan_profile(given.profile, **chosen)
        width = max(len(step.notebook) for step in steps)
        print(*(f"{step.notebook:<{width}}  {step.status:<5}  {step.reason}" for step in steps), sep="\n")
    except ReproduceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        stopped = [f"{step.notebook} ({step.status})" for step in error.steps if step.status in _STOPPED]
        print(f"error: {', '.join(stopped)}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; what is finished is kept, run again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print("interrupted: the notebook under way starts again next time", file=sys.stderr)
        return 143 if stopped.args else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
