"""The command line: `python -m apexlib COMMAND`; each command imports what it needs when it runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done; 1: a check failed or training had to stop; 2: it could not start, or not write; 130, 143: interrupted by
    SIGINT or SIGTERM, and what was done is saved. One line on stderr says why.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["reproduce"]:
        from apexlib.suite.runner import main as reproduce

        return reproduce(given[1:])
    parser = argparse.ArgumentParser(prog="python -m apexlib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("reproduce", help="run the notebooks of a profile (options: reproduce --help)")
    difference = commands.add_parser("difference", help="assess heads and channels of a model; write two tables")
    difference.add_argument("model", help="a causal LM: folder, or name on the Hub")
    difference.add_argument("--revision", help="commit of a model on the Hub")
    difference.add_argument("--corpus", default="stdlib", help="stdlib, stdlib-code, stdlib-prose or a file")
    difference.add_argument("--length", type=int, default=256, help="tokens per block")
    difference.add_argument("--blocks", type=int, default=256, help="blocks to assess over")
    difference.add_argument("--batch", type=int, default=8, help="blocks per batch")
    difference.add_argument("--top", type=float, default=0.1875, help="fraction K of the rank score")
    difference.add_argument("--out", type=Path, default=Path(), help="folder for activations.csv and imbalance.csv")
    difference.set_defaults(run=_difference)
    spectrum = commands.add_parser("spectrum", help="effective rank of every weight matrix, or of every update")
    spectrum.add_argument("model", help="a folder with safetensors files, read matrix by matrix, or a name on the Hub")
    spectrum.add_argument("--base", help="measure the update from this model, folder or name")
    spectrum.add_argument("--revision", help="commit of a model on the Hub")
    spectrum.add_argument("--base-revision", help="commit of a base on the Hub")
    spectrum.add_argument("--out", type=Path, default=Path(), help="folder for spectrum.csv, or updates.csv")
    spectrum.set_defaults(run=_spectrum)
    train = commands.add_parser("train", help="train a model as a YAML file says; runs under accelerate launch too")
    train.add_argument("settings", type=Path, help="model, data, method, apex, training: see the README")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an interrupted run of the same file stopped")
    again.add_argument("--overwrite", action="store_true", help="replace the run that training.output_dir holds")
    train.set_defaults(run=_train)
    plan = commands.add_parser("plan", help="say what a run will need: parameters, FLOPs, memory, disk, time")
    plan.add_argument("model", help="a causal LM or its config: folder, or name on the Hub; only the config is read")
    plan.add_argument("--batch", type=int, default=8, help="sequences per step and device")
    plan.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    plan.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    plan.add_argument("--method", nargs="+", help="apex, full, lora, hft, gmt, direct; all by default")
    plan.add_argument(
        "--apex", type=Path, help="settings, a file that ApexConfig.to_json wrote; the paper's by default"
    )
    plan.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    plan.add_argument("--calibrate", action="store_true", help="measure FLOP/s on this machine and forecast the time")
    plan.set_defaults(run=_plan)
    verify = commands.add_parser("verify", help="check a folder that save_fused wrote: hashes, values, loading")
    verify.add_argument("folder", type=Path)
    verify.set_defaults(run=_verify)
    options = parser.parse_args(given)
    try:
        return options.run(options)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        return getattr(error, "code", 130)


def _difference(options: argparse.Namespace) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from apexlib.activations import activation_statistics, check_top
    from apexlib.analysis.difference import imbalance_table
    from apexlib.progress import hide_progress
    from apexlib.provenance import save_table
    from apexlib.text.corpora import corpus_hash, load_corpus
    from apexlib.text.datasets import batches, pack

    check_top(options.top)
    if hide_progress():
        disable_progress_bar()
    documents = load_corpus(options.corpus)
    tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
    blocks = batches(pack(documents, tokenizer, options.length), options.batch, limit=options.blocks)
    model = AutoModelForCausalLM.from_pretrained(options.model, revision=options.revision)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    statistics = activation_statistics(model, blocks, top=options.top)
    facts = {"model": options.model, "revision": options.revision, "data": corpus_hash(documents), "top": options.top}
    for name, table in (("activations", statistics), ("imbalance", imbalance_table(statistics))):
        print(save_table(table, name, options.out, **facts))
    return 0


def _spectrum(options: argparse.Namespace) -> int:
    from apexlib.analysis.spectrum import spectrum_table, update_table
    from apexlib.provenance import save_table

    model = _weights(options.model, options.revision)
    facts = {"model": options.model, "revision": options.revision}
    if options.base is None:
        table, name, extra = spectrum_table(model), "spectrum", []
    else:
        table, name = update_table(_weights(options.base, options.base_revision), model), "updates"
        facts |= {"base": options.base, "base_revision": options.base_revision}
        extra = ["noise_frobenius", "noise_effective_rank", "above_noise", "before", "after", "by_chance"]
    path = save_table(table, name, options.out, **facts)
    shown = ["weight", "rows", "columns", "effective_rank", "random", "stable_rank", "srank", "frobenius", *extra]
    print(table[shown].to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(path)
    return 0


def _weights(model: str, revision: str | None) -> Any:
    """A folder as it is, so that its matrices are read one by one; a name on the Hub as a model."""
    if Path(model).is_dir() or Path(model).is_absolute() or model.count("/") > 1 or model.startswith("."):
        return model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype="auto")


def _train(options: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    from apexlib.evaluation import pad_token
    from apexlib.files import atomic_folder
    from apexlib.plan import ApexConfig
    from apexlib.progress import hide_progress
    from apexlib.provenance import save_table
    from apexlib.text.corpora import load_chat, load_corpus
    from apexlib.text.datasets import collate, encode_chat, pack
    from apexlib.training.stages import train_in_stages

    given = _settings(options.settings)
    arguments = TrainingArguments(**({"report_to": "none", "disable_tqdm": hide_progress()} | given["training"]))
    tokenizer = AutoTokenizer.from_pretrained(given["model"], revision=given["revision"])
    data, length = dict(given["data"]), given["length"]
    if given["kind"] == "chat":
        dataset, report = encode_chat(load_chat(**data), tokenizer, max_length=length)
        collator = collate(pad_token(tokenizer))
    else:
        dataset, report, collator = pack(load_corpus(**data), tokenizer, length), None, None
    model = AutoModelForCausalLM.from_pretrained(given["model"], revision=given["revision"], dtype="float32")
    config = ApexConfig(**given["apex"])
    how = {"method": given["method"], "data_collator": collator}
    again = {"resume": options.resume, "overwrite": options.overwrite}
    record = train_in_stages(model, dataset, arguments, config, **how, **again)
    if arguments.should_save:
        folder = Path(arguments.output_dir)
        with atomic_folder(folder / "final", replace=True) as temporary:
            record.model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        facts = {"settings": given, "trainable": record.trainable.to_dict("records")}
        for name, table in (("log", record.log), ("data", report)):
            if table is not None:
                print(save_table(table, name, folder, **facts))
    return 0


def _settings(path: Path) -> dict:
    """Read a training file: what it may say, with defaults, and nothing else."""
    import yaml

    defaults = {"model": None, "revision": None, "kind": "text", "data": {}, "length": 512, "method": "apex"}
    defaults |= {"apex": {}, "training": {}}
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: need a mapping with model, kind, data, length, method, apex, training")
    if unknown := given.keys() - defaults.keys():
        raise ValueError(f"{path}: unknown {', '.join(sorted(map(str, unknown)))}; known: {', '.join(defaults)}")
    settings = defaults | given
    for name in ("data", "apex", "training"):
        if not isinstance(settings[name], dict) or not all(isinstance(key, str) for key in settings[name]):
            raise ValueError(f"{path}: {name}: need a mapping of names, got {type(settings[name]).__name__}")
    if not isinstance(settings["model"], str) or "output_dir" not in settings["training"]:
        raise ValueError(f"{path}: need model (a name or path) and training.output_dir")
    if settings["kind"] not in ("text", "chat"):
        raise ValueError(f"{path}: kind {settings['kind']!r}: need text or chat")
    return settings


def _plan(options: argparse.Namespace) -> int:
    import torch

    from apexlib.analysis.budget import calibrate, plan_budget
    from apexlib.plan import ApexConfig
    from apexlib.training.methods import METHODS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = plan_budget(
        options.model,
        ApexConfig.from_json(options.apex) if options.apex else None,
        batch=options.batch,
        length=options.length,
        dtype=options.dtype,
        methods=options.method or METHODS,
        gradient_checkpointing=options.checkpointing,
        flops_per_second=calibrate(device, getattr(torch, options.dtype)) if options.calibrate else None,
    )
    print(
        table.set_index("method").T.to_string(
            float_format=lambda value: f"{value:,.4g}" if value < 100 else f"{value:,.0f}"
        )
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from apexlib.certificate import verify_folder

    checks = verify_folder(options.folder)
    for row in checks.itertuples():
        print(f"{'ok    ' if row.passed else 'FAILED'}  {row.check:<12}{row.file}  {row.detail}".rstrip())
    return 0 if checks["passed"].all() else 1


if __name__ == "__main__":
    sys.exit(main())
