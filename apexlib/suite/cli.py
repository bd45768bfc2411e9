"""The command line: `python -m apexlib COMMAND`; each command imports what it needs when it runs."""

import argparse
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

import apexlib
from apexlib.files import atomic_folder, pretrained
from apexlib.progress import hide_progress
from apexlib.suite.bars import say
from apexlib.suite.folders import folders, locate, project_root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(_parser(given).parse_args(given))
    try:
        return options.pop("run")(**options) or 0
    except FloatingPointError as error:
        message, code = f"error: {error}", 1
    except (ValueError, TypeError, OSError) as error:
        message, code = " ".join(["error:", *str(error).split()]), 2
    except ImportError as error:
        message, code = f"error: {error}; need pip install 'apexlib[notebooks]'", 2
    except KeyboardInterrupt as error:
        message, code = f"interrupted: {error}".removesuffix(": "), getattr(error, "code", 130)
    say(message)
    return code


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser that `cli.yaml` describes, for the arguments that are given."""
    described = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    look = {"description": described.pop("description"), "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m apexlib", **look)
    parser.add_argument("--version", action="version", version=f"apexlib {metadata.version('apexlib')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    if given[:1] == ["plan"]:
        from apexlib.training.methods import Name  # loads torch

        methods = get_args(Name)
        known = {"choices": methods, "default": methods, "help": ", ".join(methods)}
        described["plan"]["arguments"]["--method"] |= known
    for name, command in described.items():
        text = command["help"]
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run=globals()[f"_{name.replace('-', '_')}"])
        groups = {False: sub}
        for argument, options in command["arguments"].items():
            if either := options.pop("either", False):
                groups[either] = groups.get(either) or sub.add_mutually_exclusive_group()
            if "type" in options:
                options["type"] = _TYPES[options["type"]]
            if isinstance(options.get("metavar"), list):  # of several values
                options["metavar"] = tuple(options["metavar"])
            groups[either].add_argument(argument, **options)
    return parser


def _seconds(text: str) -> float:
    """Read a time.

    >>> _seconds("30m"), _seconds("8m30s"), _seconds("2h"), _seconds("45s")
    (1800.0, 510.0, 7200.0, 45.0)
    """
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: need a time such as 30m, 8m30s, 2h or 45s")
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


_TYPES = {"int": int, "float": float, "path": Path, "time": _seconds}


def _reproduce(
    *,
    profile: str,
    settings: list[str],
    claims: list[int],
    budget: float,
    dry_run: bool,
    listing: bool,
    parameters: list[str] | None,
    **chosen: Any,
) -> int:
    from apexlib.suite import runner
    from apexlib.suite.notebooks import METHODS, read_profile
    from apexlib.suite.outcome import outcome

    root = runner.find_root()
    if listing:
        print(*_listing(profile, root), sep="\n")
        return 0
    if parameters:
        print(_values(*parameters, root), end="")
        return 0
    assigned = _assigned(settings, "NOTEBOOK.PARAMETER=VALUE")
    job = runner.job_of(profile, claims, root=root, settings=assigned, **chosen)
    if claims:
        for name in job.selected:
            values = job.profile.notebooks[name]
            for key in (key for key in METHODS if key in values):
                print(f"{job.profile.name}  {name}, {key}: {', '.join(values[key])}")
    if dry_run:
        steps = job.plan()
        width = max(len(step.notebook) for step in steps)
        print(*(f"{step.notebook:<{width}}  {step.status:<5}  {step.reason}" for step in steps), sep="\n")
        return 0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        steps = job.run(budget)
    except runner.RunError as error:
        left = ", ".join(f"{step.notebook} ({step.status})" for step in error.left)
        why = "others have the rest" if chosen["share"] else "time is over"
        print(f"error: {left}" if error.failed else f"{why}; left: {left}; run again to go on", file=sys.stderr)
        return 1 if error.failed else 3
    except OSError as error:
        print(f"error: {error}; what is finished is kept, run again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print("interrupted: the notebook under way starts again next time", file=sys.stderr)
        return 143 if stopped.args else 130
    if claims:
        whole = folders(read_profile(profile, root / "notebooks" / "profiles").name, root).results
        return _show_verdicts(claims, job.folders.results, whole, root)
    print(*outcome(job.profile, root, {step.notebook for step in steps}), sep="\n")
    return 0


def _play() -> None:
    from apexlib.suite.play import lay_out

    for line in [*lay_out(project_root())]:  # all is laid out before a word is said
        print(line)


def _compare(*, profile: str) -> int:
    from apexlib.suite.agreement import agreement

    found, lines = agreement(profile, project_root()), list[tuple[str, str, str]]()
    for folder, rows in found.groupby("folder", sort=False):
        own = folder == found["folder"].iloc[0]
        if not own and rows["agrees"].eq("equal").all():
            lines.append((f"{folder}/", f"{len(rows)} equal", ""))
        else:
            named = rows["table"] if own else f"{folder}/" + rows["table"]
            lines.extend(zip(named, rows["agrees"], rows["where"], strict=True))
    width = max(len(name) for name, *_ in lines)
    for name, agrees, where in lines:
        print(f"{name:<{width}}  {agrees:<9}  {where}".rstrip())
    return int(found["agrees"].eq("different").any())


def _assigned(texts: Sequence[str], need: str) -> dict[str, Any]:
    """Read settings given as NAME=VALUE, the value in YAML."""
    from apexlib.suite.notebooks import load_yaml

    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key.count(".") < need.count("."):
            raise ValueError(f"--set {text}: need {need}")
        values[key] = load_yaml(value, f"--set {text}")
    return values


def _terminate(*_: Any) -> None:
    raise KeyboardInterrupt("SIGTERM")


def _listing(profile: str, root: Path) -> Iterator[str]:
    from apexlib.suite.notebooks import read_profile, resolve

    folder = root / "notebooks"
    names = sorted(path.stem for path in (folder / "profiles").glob("*.yaml"))
    for name in names:
        each = read_profile(name, folder / "profiles")
        note = "" if each.runnable else " (not run here)"
        yield f"profile {name:<{max(map(len, names))}}  {each.description}{note}"
    chosen = read_profile(profile, folder / "profiles")
    for name, notebook in chosen.read_notebooks(folder).items():
        values = resolve(notebook, chosen, {})
        yield f"\n{name}  writes {', '.join(notebook.writes) or 'nothing'}"
        for parameter in notebook.parameters.values():
            told = f"  {parameter.name}: {parameter.kind} = {values[parameter.name]!r}  # {parameter.help}"
            yield told.removesuffix("  # ")


def _values(profile: str, prefix: str, root: Path) -> str:
    """Write what a notebook takes in a profile, as YAML."""
    from apexlib.suite.notebooks import matching, read_profile, resolve

    chosen = read_profile(profile, root / "notebooks" / "profiles")
    notebooks = chosen.read_notebooks(root / "notebooks")
    values = resolve(notebooks[matching(prefix, notebooks)[0]], chosen, {})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _show_verdicts(numbers: Sequence[int], results: Path, whole: Path, root: Path) -> int:
    """Print claims as `results` decide them, beside what those of the `whole` profile did; 1: a table is damaged."""
    from apexlib.suite.ledger import claims_table, measured, read_claims, repeated

    try:
        table = claims_table(results, only=numbers, claims=read_claims(root / "data" / "claims.yaml"))
        table = repeated(table, whole)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in table.itertuples():
        print(f"claim {row.number}: {row.statement}")
        print(f"  the paper  {row.expected}")
        print(f"  here       {measured(row)}; {row.rule}; seeds: {row.n}")
        recorded = f"; recorded: {row.elsewhere}" if row.elsewhere and results != whole else ""
        print(f"  verdict    {row.verdict}{recorded}")
        print(f"  limits     {row.limits}")
    return 0


def _difference(
    *, model: str, revision: str | None, corpus: str, length: int, blocks: int, batch: int, top: float, out: Path
) -> None:
    from apexlib.suite.inputs import load_model, load_tokenizer
    from apexlib.text.cache import corpus_hash

    documents = apexlib.load_corpus(corpus)
    packed = apexlib.pack(documents, load_tokenizer(model, revision=revision), length)
    assessment = apexlib.batches(packed, batch, limit=blocks)
    statistics = apexlib.activation_statistics(load_model(model, revision=revision), assessment, top=top)
    facts = {"model": model, "revision": revision, "data": corpus_hash(documents), "top": top}
    for name, table in (("activations", statistics), ("imbalance", apexlib.imbalance_table(statistics))):
        print(apexlib.save_table(table, name, out, **facts))


def _spectrum(
    *, model: str, base: str | None, revision: str | None, base_revision: str | None, processes: int, out: Path
) -> None:
    measured, facts = _weights(model, revision), {"model": model, "revision": revision}
    if base is None:
        table, name, extra = apexlib.spectrum_table(measured, processes=processes), "spectrum", []
    else:
        table, name = apexlib.update_table(_weights(base, base_revision), measured), "updates"
        facts |= {"base": base, "base_revision": base_revision}
        extra = ["noise_frobenius", "noise_effective_rank", "above_noise", "before", "after", "by_chance"]
    path = apexlib.save_table(table, name, out, **facts)
    shown = ["weight", "rows", "columns", "effective_rank", "random", "stable_rank", "srank", "frobenius", *extra]
    print(table[shown].to_string(index=False, float_format=lambda value: f"{value:.4g}"), path, sep="\n")


def _weights(model: str, revision: str | None) -> Any:
    """A folder as it is, so that its matrices are read one by one; a name on the Hub as a model."""
    model = locate(model)
    if Path(model).is_dir() or Path(model).is_absolute() or model.count("/") > 1 or model.startswith("."):
        return model
    from transformers import AutoModelForCausalLM

    return pretrained(AutoModelForCausalLM, model, revision=revision, dtype="auto")


def _train(*, settings: Path, changes: list[str], **again: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    from apexlib.text.answers import pad_token

    given = _settings(settings, _assigned(changes, "NAME=VALUE"))
    arguments = TrainingArguments(**({"report_to": "none", "disable_tqdm": hide_progress()} | given["training"]))
    tokenizer = pretrained(AutoTokenizer, given["model"], revision=given["revision"])
    report = collator = None
    if given["kind"] == "chat":
        chat = apexlib.load_chat(**given["data"])
        dataset, report = apexlib.encode_chat(chat, tokenizer, max_length=given["length"])
        collator = apexlib.collate(pad_token(tokenizer))
    else:
        dataset = apexlib.pack(apexlib.load_corpus(**given["data"]), tokenizer, given["length"])
    model = pretrained(AutoModelForCausalLM, given["model"], revision=given["revision"], dtype="float32")
    asked = {"method": given["method"], "data_collator": collator, **again}
    record = apexlib.train_in_stages(model, dataset, arguments, apexlib.ApexConfig(**given["apex"]), **asked)
    if arguments.should_save:
        folder = Path(arguments.output_dir)
        with atomic_folder(folder / "final", replace=True) as temporary:
            record.model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        facts = {"settings": given, "trainable": record.trainable.to_dict("records")}
        for name, table in (("log", record.log), ("data", report)):
            if table is not None:
                print(apexlib.save_table(table, name, folder, **facts))


def _settings(path: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a training file: what it may say, with defaults, and nothing else; `changes` has dotted names."""
    from pydantic import Field

    from apexlib.suite.notebooks import Strict, load_yaml, validated
    from apexlib.training.methods import Name

    class Settings(Strict):
        model: str
        revision: str | None = None
        kind: Literal["text", "chat"] = "text"
        data: dict[str, Any] = Field(default_factory=dict)
        length: int = 512
        method: Name = "apex"
        apex: dict[str, Any] = Field(default_factory=dict)
        training: dict[str, Any]

    found = load_yaml(path, str(path))
    for name, value in (changes or {}).items():
        *above, last = name.split(".")
        try:
            part = reduce(lambda part, key: part.setdefault(key, {}), above, found)
            part[last] = value
        except (AttributeError, TypeError):
            raise ValueError(f"--set {name}: need a mapping at {'.'.join(above) or path}") from None
    settings = dict(validated(Settings, found, str(path)))
    if "output_dir" not in settings["training"]:
        raise ValueError(f"{path}, training: need output_dir")
    return settings


def _plan(*, model: str, method: list[str], apex: Path | None, calibrate: bool, **asked: Any) -> None:
    import torch

    from apexlib.analysis import budget

    if calibrate:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        asked["flops_per_second"] = budget.calibrate(device, getattr(torch, asked["dtype"]))
    config = apex and apexlib.ApexConfig.from_json(apex)
    table = apexlib.plan_budget(model, config, methods=method, **asked).set_index("method").T
    print(table.to_string(float_format=lambda value: f"{value:,.4g}" if value < 100 else f"{value:,.0f}"))


def _fuse(*, folder: Path, base: str | None, out: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from apexlib.files import check_new
    from apexlib.training.unfinished import newest_model

    check_new(out)
    disable_progress_bar()  # of weights
    base = base and locate(base)
    model, state, plans = newest_model(folder, base)
    sources = [source for source in (state, base) if source and (Path(source) / "tokenizer_config.json").is_file()]
    tokenizer = pretrained(AutoTokenizer, sources[0]) if sources else None
    apexlib.save_fused(model, out, tokenizer=tokenizer, plans=plans, facts={"state": f"{state.name} of {folder.name}"})
    print(f"{out}: {state.name} of {folder}, {'with' if tokenizer else 'without'} a tokenizer")


def _verify(*, folder: Path) -> int:
    checks = apexlib.verify_folder(folder)
    for row in checks.itertuples():
        print(f"{'ok    ' if row.passed else 'FAILED'}  {row.check:<12}{row.file}  {row.detail}".rstrip())
    return 0 if checks["passed"].all() else 1


def _export_update(*, base: Path, tuned: Path, file: Path) -> None:
    table = apexlib.export_update(base, tuned, file)
    size, full = file.stat().st_size, table["full"].sum()
    print(table[table["kept"] != "same"].to_string(index=False))
    print(f"{file}: {size:,} bytes, {size / full:.1%} of the checkpoint's {full:,}")


def _apply_update(*, base: Path, file: Path, folder: Path) -> None:
    print(apexlib.apply_update(base, file, folder))
