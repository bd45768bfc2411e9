"""Run the notebooks of a profile in order, each only if what it depends on changed."""

import math
import platform
import re
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from apexlib.files import clear_partial, content_hash, exclusive, file_hash, read_object, write_json
from apexlib.provenance import git, provenance
from apexlib.suite.bars import RunBars, duration, say
from apexlib.suite.dependencies import LIBRARY, code_of_source, normalised
from apexlib.suite.execution import execute, stamps
from apexlib.suite.folders import folders, project_root
from apexlib.suite.ledger import Claim, choose, compared, read_claims
from apexlib.suite.notebooks import (
    Notebook,
    Profile,
    ReproduceError,
    matching,
    narrowed,
    read_notebook,
    read_profile,
    resolve,
    unknown,
    writer_of,
)
from apexlib.suite.publishing import publish
from apexlib.suite.trials import DEADLINE, PROCESSES, SHARE, WORKERS, scheduler

_STATE_FORMAT = 2
_SHARE = "share-"  # how the folders begin in which parts of a run keep their own
_STOPPED = ("failed", "unfinished", "not run")


@dataclass(frozen=True)
class Step:
    """What will become of a notebook (run, maybe, skip), or became of it (the other five), and why."""

    notebook: str
    status: Literal["run", "maybe", "skip", "done", "up to date", "failed", "unfinished", "not run"]
    reason: str = ""


class RunError(RuntimeError):
    """A run that leaves work: a notebook `failed`, or else its time was over; `steps` says what became of each."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.left = [step for step in steps if step.status in _STOPPED]
        self.failed = any(step.status == "failed" for step in steps)
        super().__init__("\n".join(f"{step.notebook} {step.status}: {step.reason}" for step in self.left))


def run_profile(profile: str = "cpu", *, budget: float = math.inf, **chosen: Any) -> list[Step]:
    """Run the notebooks of `profile` (a name or a YAML file) whose inputs or results changed since they last ran.

    `chosen`: `root`, the project's folder; `only` (several) and `start`, beginnings of notebook names, or `claims`,
    numbers of the ledger (`job_of`); `force`, to run what is up to date; `settings` maps "notebook.parameter" to a
    value. Once `budget` seconds are over, no notebook is started, and the one under way starts no further training.
    With `share` "3/16", one of sixteen runs at the same time, on machines that see one folder, does the third part of
    the trainings; a run of all then finds them done. `workers`, the address of a Dask scheduler, has its workers train;
    `processes` is how many trainings run side by side here. Raises `ReproduceError` before anything has run, `RunError`
    after all that depends on no failed or unfinished notebook has.
    """
    return job_of(profile, **chosen).run(budget)


def plan_profile(profile: str = "cpu", **chosen: Any) -> list[Step]:
    """Tell what `run_profile` would do, given the same choices; nothing is run and nothing written."""
    return job_of(profile, **chosen).plan()


def job_of(profile: str, claims: Sequence[int] = (), **chosen: Any) -> "Job":
    """Read and check what is asked for.

    What `claims` need, unless it is up to date and not forced, is run with the methods that they compare, no others, as
    a profile of its own: its folders are named "<profile>-claims", the tables of the whole profile stay as they are.
    """
    job = Job(profile, claims=claims, **chosen)
    if not claims or all(step.status == "skip" for step in job.plan()):
        return job
    whole = job.needed_by([claim for claim in job.claims if not claim.methods])  # these may compare all
    few = [job.notebooks[name] for name in job.selected if name not in whole]
    fewer = narrowed(job.profile, few, compared(job.claims), job.settings)
    return job if fewer.notebooks == job.profile.notebooks else Job(fewer, claims=claims, **chosen)


def find_root(root: Path | None = None) -> Path:
    """Find the project around the working directory, else the one this file belongs to."""
    try:
        return Path(root).resolve() if root else project_root()
    except FileNotFoundError:
        return project_root(Path(__file__).parent)


class _State:
    """What earlier runs left behind: per notebook its inputs and its record, per file the hash last seen."""

    def __init__(self, root: Path, path: Path, own: Path | None = None) -> None:
        self.root, self.path = root, (own or path.parent) / path.name  # where it is kept
        self.notebooks: dict[str, dict[str, Any]] = {}
        self.files: dict[str, list[Any]] = {}
        with suppress(FileNotFoundError, ValueError, KeyError):
            found = read_object(path)
            if found["sha256"] == content_hash(_STATE_FORMAT, found["notebooks"], found["files"]):  # else damaged
                self.notebooks, self.files = found["notebooks"], found["files"]

    def save(self) -> None:
        seal = content_hash(_STATE_FORMAT, self.notebooks, self.files)
        write_json({"sha256": seal, "notebooks": self.notebooks, "files": self.files}, self.path)

    def hash(self, path: str) -> str | None:
        """Hash a file, or names and contents of a folder, read again only if size or time changed; None if absent."""
        found = stamps(self.root, path)
        for name, stamp in found.items():
            if self.files.get(name, [])[:-1] != stamp:
                self.files[name] = [*stamp, file_hash(self.root / name)]
        hashes = {name: self.files[name][-1] for name in found}
        return (content_hash(hashes) if path.endswith("/") else hashes[path]) if hashes else None


class Job:
    """One run as it was asked for: everything is read and checked before anything starts."""

    def __init__(
        self,
        profile: str | Profile,
        root: Path | None = None,
        *,
        only: Collection[str] = (),
        start: str | None = None,
        claims: Sequence[int] = (),
        settings: Any = None,
        force: bool = False,
        share: str | None = None,
        workers: str | None = None,
        processes: int | None = None,
    ) -> None:
        self.root = find_root(root)
        known = self.root / "notebooks" / "profiles"
        self.profile = profile if isinstance(profile, Profile) else read_profile(profile, known)
        if not self.profile.runnable:
            raise ReproduceError(f"profile {self.profile.name} is not run here: {' '.join(self.profile.why.split())}")
        self.folders = folders(self.profile.name, self.root)
        self.manifest = self.folders.results / "manifest.json"
        self.force, self.share, self.runs = force, share, self.folders.runs  # with what this run itself writes there
        self.own = (self.folders.results, self.folders.figures, self.folders.models, self.runs)  # no other writes there
        if share is not None:
            part, parts = map(int, found.groups()) if (found := re.fullmatch(r"(\d+)/(\d+)", share)) else (0, 0)
            if not 1 <= part <= parts:
                raise ReproduceError(f"share {share!r}: need a part of all, such as 3/16")
            self.runs = self.folders.runs / f"{_SHARE}{part}-of-{parts}"
            self.own = (self.runs,)
        self.notebooks = self.profile.read_notebooks(self.root / "notebooks")
        self.writer = partial(writer_of, notebooks=self.notebooks)  # the name of the one that writes a path
        names = self.selected = list(self.notebooks)
        if only:
            self.selected = sorted({name for prefix in only for name in matching(prefix, names)})
        elif start is not None:
            self.selected = names[names.index(matching(start, names)[0]) :]
        elif claims:
            self.claims = self._chosen(claims)
            self.selected = self.needed_by(self.claims)
        self.settings: dict[str, dict[str, Any]] = {}
        for key, value in (settings or {}).items():
            prefix, _, parameter = key.partition(".")
            for name in matching(prefix, self.selected):
                self.settings.setdefault(name, {})[parameter] = value
        for notebook in self.notebooks.values():
            resolve(notebook, self.profile, self.settings)
        for name in self.selected:
            self._check_needs(self.notebooks[name])
        self.state = _State(self.root, self.folders.runs / "state.json")
        if processes is not None and processes < 1:
            raise ReproduceError(f"processes {processes}: need at least one")
        given = {SHARE: share, WORKERS: workers, PROCESSES: processes}
        self.environment = {name: str(value) for name, value in given.items() if value is not None}
        if workers is not None:
            try:
                scheduler(workers).close()
            except ValueError as error:
                raise ReproduceError(str(error)) from None

    def _chosen(self, claims: Sequence[int]) -> list[Claim]:
        try:
            return choose(read_claims(self.root / "data" / "claims.yaml"), claims)
        except (OSError, ValueError) as error:
            raise ReproduceError(str(error)) from None

    def needed_by(self, claims: Sequence[Claim]) -> list[str]:
        """Name the notebooks that claims of the ledger need, with all those whose results these need."""
        wanted = [name for claim in claims for name in claim.notebooks]
        for name in wanted:  # grows on the way
            if name not in self.notebooks:
                raise unknown("notebook", name, self.notebooks, f"data/claims.yaml with profile {self.profile.name}")
            wanted += {*map(self.writer, self.notebooks[name].needs)} - {None, *wanted}
        return sorted(set(wanted))

    def _check_needs(self, notebook: Notebook) -> None:
        for path in notebook.needs:
            writer = self.writer(path)
            if writer in self.selected or stamps(self.root, path):
                continue
            beside: dict[str, Notebook] = {}
            for file in notebook.path.parent.glob("*.ipynb"):
                with suppress(ReproduceError):  # it may be anybody's
                    beside[file.stem] = read_notebook(file, self.profile.name)
            if writer is not None:
                told = f": {writer} writes it, run that too (--from {writer[:2]})"
            elif writer := writer_of(path, beside):
                told = f": {writer} writes it, but is not in profile {self.profile.name}"
            else:
                told = " and which no notebook writes"
            raise ReproduceError(f"{notebook.name} needs {path}, which is missing{told}")

    def edited(self) -> list[str]:
        """Name the notebooks that differ from those committed; none where git cannot tell."""
        paths = [str(notebook.path) for notebook in self.notebooks.values()]
        found = git(self.root, "status", "--porcelain", "-z", "--untracked-files=no", "--", *paths) or ""
        return sorted(Path(line[3:]).stem for line in found.split("\0") if line)

    def inputs(self, notebook: Notebook) -> dict[str, Any]:
        """Collect everything the notebook's results depend on, under names that a user knows."""
        texts = filter(None, map(normalised, notebook.deciding))
        values = resolve(notebook, self.profile, self.settings)
        package = self.root / "apexlib"  # that its kernel will import
        beside = values.get("beside") or []  # runs whose results it reads too, where they are there
        others = [f"data/results/{name}/" for name in ([beside] if isinstance(beside, str) else beside)]
        return {
            **{f"code cell {number}": content_hash(text) for number, text in enumerate(texts, 2)},
            **{f"parameter {name}": value for name, value in values.items()},
            "what it writes": content_hash(notebook.writes),
            **{path: self.state.hash(path) for path in (*notebook.needs, *others)},
            **code_of_source(notebook.deciding, package if package.is_dir() else LIBRARY),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
            "Python": platform.python_version(),
        }

    def stale(self, notebook: Notebook, inputs: Mapping[str, Any] | None = None) -> str:
        """Say why the notebook has to run; "" if its results are up to date."""
        past = self.state.notebooks.get(notebook.name)
        if not past:
            return "never run" if past is None else "the last run did not finish"
        old, new = past["inputs"], inputs or self.inputs(notebook)
        if changed := [key for key in {**new, **old} if old.get(key, ...) != new.get(key, ...)]:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return f"changed: {', '.join(changed[:3])}{more}"
        for path, written in past["record"]["artifacts"].items():
            if (found := self.state.hash(path)) != written:
                return f"{'missing' if found is None else 'not as it was written'}: {path}"
        return ""

    def plan(self) -> list[Step]:
        """Tell what will become of each selected notebook."""
        steps: list[Step] = []
        for name in self.selected:
            notebook, moving = self.notebooks[name], [step.notebook for step in steps if step.status != "skip"]
            if reason := "forced" if self.force else self.stale(notebook):
                steps.append(Step(name, "run", reason))
            elif upstream := [path for path in notebook.needs if self.writer(path) in moving]:
                steps.append(Step(name, "maybe", f"if {self.writer(upstream[0])} changes {upstream[0]}"))
            else:
                steps.append(Step(name, "skip", "up to date"))
        return steps

    def expected(self) -> dict[str, dict[str, Any]]:
        """What is recorded of each selected notebook, as `RunBars` takes it; 0 seconds if it will not run."""
        past: dict[str, dict[str, Any]] = {}
        with suppress(ValueError, TypeError):  # damaged
            for name, entry in self.recorded().items():
                past[name] = {key: float(entry[key]) for key in ("seconds", "trials") if key in entry}
        return {
            step.notebook: {"seconds": 0.0} if step.status == "skip" else past.get(step.notebook, {})
            for step in self.plan()
        }

    def run(self, budget: float = math.inf) -> list[Step]:
        """Run what `plan` tells, as `run_profile` does."""
        deadline, steps = time.time() + budget, list[Step]()
        with ExitStack() as held:
            try:
                held.enter_context(exclusive(self.runs / ".lock"))
                for lock in sorted(self.runs.glob(f"{_SHARE}*/.lock")):
                    held.enter_context(exclusive(lock))
            except BlockingIOError:
                raise ReproduceError(f"profile {self.profile.name}: another run of it has not ended yet") from None
            for folder in self.own:
                clear_partial(folder)
            self.state = _State(self.root, self.folders.runs / "state.json", self.runs)  # as the run before left it
            held.callback(self.keep, steps)
            if edited := self.edited():
                say(f"note: {', '.join(edited)}: not as committed")
            bars = held.enter_context(closing(RunBars(self.expected())))
            for name in self.selected:
                bars.begin(name)
                steps.append(self.take_turn(name, steps, deadline, bars))
                say("  ".join(filter(None, (name, steps[-1].status, steps[-1].reason))))
        if any(step.status in _STOPPED for step in steps):
            raise RunError(steps)
        return steps

    def take_turn(self, name: str, steps: Sequence[Step], deadline: float, bars: RunBars) -> Step:
        """Run one notebook, unless it is up to date, needs what is not there yet, or the time is over."""
        try:
            # read once more, since it may have been edited while those before it ran
            notebook = read_notebook(self.notebooks[name].path, self.profile.name)
            stopped = [step.notebook for step in steps if step.status in _STOPPED]
            if blocked := [writer for path in notebook.needs if (writer := self.writer(path)) in stopped]:
                return Step(name, "not run", f"needs {blocked[0]}")
            inputs = self.inputs(notebook)
            reason = "forced" if self.force else self.stale(notebook, inputs)
        except ReproduceError as error:
            return Step(name, "failed", str(error))
        for path in notebook.needs:
            writer = self.writer(path)
            if writer and writer not in self.selected and (why := self.stale(self.notebooks[writer])):
                say(f"{name}  note: {path} is out of date, {writer}: {why}")
        if not reason:
            return Step(name, "up to date")
        if time.time() >= deadline:
            return Step(name, "not run", "the time is over")
        say(f"{name}  start: {reason}")
        self.state.notebooks[name] = {}  # stays so unless the notebook finishes
        self.state.save()
        made_with = provenance()  # before it runs
        values = resolve(notebook, self.profile, self.settings)
        copy = self.runs / notebook.path.name
        environment = self.environment | ({DEADLINE: str(deadline)} if deadline < math.inf else {})
        execution = execute(notebook, values, root=self.root, copy=copy, environment=environment, bars=bars)
        if execution.out_of_time:
            return Step(name, "unfinished", execution.problem)
        if execution.problem:
            return Step(name, "failed", f"{execution.problem}\n  as far as it got: {copy}")
        artifacts = {path: self.state.hash(path) for path in notebook.writes}
        record = {
            **{key: made_with[key] for key in ("created", "commit", "source_modified")},
            **_table_facts(artifacts, self.root),
            "parameters": values,
            "artifacts": artifacts,
            "seconds": round(execution.seconds, 1),
            **({} if execution.trials is None else {"trials": execution.trials}),
            "peak_memory_mb": execution.peak_memory_mb,
        }
        told = {"profile": self.profile.name, **{key: record[key] for key in ("created", "commit", "device")}}
        changed = {key: value for key, value in values.items() if value != notebook.parameters[key].default}
        publish(copy, self.folders.executed / copy.name, root=self.root, changed=changed, **told)
        self.state.notebooks[name] = {"inputs": inputs, "record": record}
        self.state.save()
        memory = f", {execution.peak_memory_mb} MB" if execution.peak_memory_mb else ""
        return Step(name, "done", f"{duration(execution.seconds)}{memory}")

    def keep(self, steps: Sequence[Step]) -> None:
        """Write down what is remembered and what each notebook's whole results were made with.

        What is not known of a notebook, which this copy of the project may never have run to its end, the manifest that
        is there tells, as long as that stands.
        """
        self.state.save()
        if self.share:
            return
        recorded, done = self.recorded(), {}
        for name in self.profile.notebooks:
            if past := self.state.notebooks.get(name):
                done[name] = past["record"]
            elif (entry := recorded.get(name)) and self.stands(entry):
                done[name] = entry
        if recorded and done == recorded:
            return
        facts = provenance(profile=self.profile.name, notebooks=done)
        del facts["device"]  # that of this process, which computes nothing; each notebook's is in its entry
        write_json(facts, self.manifest)

    def recorded(self) -> dict[str, dict[str, Any]]:
        """What the manifest tells of each notebook; nothing where it is absent or damaged."""
        try:
            return {name: dict(entry) for name, entry in read_object(self.manifest)["notebooks"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def stands(self, entry: Mapping[str, Any]) -> bool:
        """Whether nothing that is there of what an entry of the manifest lists has changed since."""
        written = entry.get("artifacts")
        return isinstance(written, dict) and all(self.state.hash(path) in (None, written[path]) for path in written)


def _table_facts(artifacts: Mapping[str, str | None], root: Path) -> dict[str, Any]:
    """Collect data hashes and devices from the JSON beside each table, where it is about that very table."""
    beside = {path: (root / path).with_suffix(".json") for path in artifacts if path.endswith(".csv")}
    found = {path: read_object(file) for path, file in beside.items() if file.is_file()}
    tables = {path: facts for path, facts in found.items() if facts.get("sha256") == artifacts[path]}
    devices = sorted({facts["device"] for facts in tables.values() if "device" in facts})
    data = {path: facts["data"] for path, facts in tables.items() if "data" in facts}
    return {"data": data, "device": ", ".join(devices) or None}
