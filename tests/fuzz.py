"""Damaged and hostile files for every loader: each must load, or be refused in our own words, soon and unexecuted.

`python tests/fuzz.py FOLDER INPUTS [SEED]` tries so many inputs in all and writes `fuzz.csv`, one row per loader, and
each input that was not taken as it must be.
"""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from conftest import build
from transformers import PreTrainedTokenizerFast

from apexlib import ApexConfig, ExpansionPlan, LayerPlan, export_update, save_fused, verify_folder
from apexlib.files import write_json
from apexlib.suite.cli import _settings, main
from apexlib.suite.ledger import read_claims
from apexlib.suite.memory import resident_mb
from apexlib.suite.notebooks import read_notebook, read_profile
from apexlib.suite.runner import _State
from apexlib.text.corpora import load_chat, load_corpus
from apexlib.text.tokenizer import train_tokenizer
from apexlib.training.checkpoints import RunFolder, fault, read_state, write_state

ROOT = Path(__file__).parents[1]
SECONDS = 20  # a loader that takes longer hangs
MEMORY = 2 << 30  # bytes that all of it together takes at most


class Canary:
    """A pickle that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@dataclass(frozen=True)
class Loader:
    """What reads a file. `sealed`: a hash covers the file, so that any change must be refused."""

    name: str
    path: Path
    load: Callable[[Path], object]
    sealed: bool = False
    slow: bool = False  # a few inputs will do


def loaders(folder: Path) -> list[Loader]:
    """Write one sound file for each loader."""
    folder.mkdir()
    plan = ExpansionPlan((LayerPlan(0, "head", (1,), (0,), (2,), units=4),), ApexConfig())
    plan.to_json(folder / "plan.json")
    ApexConfig().to_json(folder / "config.json")
    documents = [f"document {n} of a corpus, with ä" for n in range(20)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    rows = "\n".join(json.dumps({"text": text}) for text in documents)
    (folder / "text.jsonl").write_text(rows, encoding="utf-8")
    (folder / "text.txt.gz").write_bytes(gzip.compress(rows.encode()))
    pd.DataFrame({"text": documents}).to_parquet(folder / "text.parquet")
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    (folder / "chat.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 3), encoding="utf-8")
    shutil.copy(ROOT / "notebooks" / "profiles" / "smoke.yaml", folder / "profile.yaml")
    shutil.copy(ROOT / "notebooks" / "02_expansion_step_by_step.ipynb", folder / "02_notebook.ipynb")
    shutil.copy(ROOT / "data" / "claims.yaml", folder / "claims.yaml")
    training = "model: m\nkind: text\ndata: {source: t.txt}\nlength: 32\napex: {fraction: 0.25}\n"
    (folder / "train.yaml").write_text(training + "training: {output_dir: o, max_steps: 6}\n", encoding="utf-8")
    write_json({"format": 1, "identity": {"steps": 3}, "provenance": {}}, folder / "run" / "run.json")
    with RunFolder(folder / "run").complete(folder / "step-0-1") as state:
        write_state({"parameters": {"a": torch.arange(6.0)}, "loss": [0.5, None]}, state)
        pd.DataFrame({"stage": [0], "activation": [0.1]}).to_parquet(state / "assessed.parquet")
        write_json({"histories": []}, state / "progress.json")
    shutil.copytree(folder / "step-0-1", folder / "unsealed")
    state = _State(folder, folder / "state.json")
    state.notebooks["00"] = {"inputs": {"source": "0"}, "record": {"artifacts": {"a.csv": "0"}}}
    state.files["a.csv"] = [1, 2, "0"]
    state.save()
    with warnings.catch_warnings():
        save_fused(build("llama", num_hidden_layers=1), folder / "fused")
    command = commands(folder, documents)
    whole = {"split": "all"}
    return [
        Loader("plan", folder / "plan.json", ExpansionPlan.from_json),
        Loader("config", folder / "config.json", ApexConfig.from_json),
        Loader("corpus, text", folder / "text.txt", lambda path: load_corpus(path, **whole)),
        Loader("corpus, JSON lines", folder / "text.jsonl", lambda path: load_corpus(path, **whole)),
        Loader("corpus, gzip", folder / "text.txt.gz", lambda path: load_corpus(path, **whole)),
        Loader("corpus, parquet", folder / "text.parquet", lambda path: load_corpus(path, **whole)),
        Loader("chat", folder / "chat.jsonl", lambda path: load_chat(path, **whole)),
        Loader("profile", folder / "profile.yaml", lambda path: read_profile(str(path), path.parent)),
        Loader("notebook", folder / "02_notebook.ipynb", lambda path: read_notebook(path, "cpu")),
        Loader("claims", folder / "claims.yaml", read_claims),
        Loader("training file", folder / "train.yaml", _settings),
        Loader("state of a run", folder / "unsealed" / "state.json", lambda path: read_state(path.parent)),
        Loader("tensors of a run", folder / "unsealed" / "state.safetensors", lambda path: read_state(path.parent)),
        Loader("memory of the runner", folder / "state.json", lambda path: _State(folder, path)),
        Loader("identity of a run", folder / "run" / "run.json", _resume),
        *(
            Loader("checkpoint", path, lambda path: _refuse(fault(path.parent)), sealed=path.name != "manifest.json")
            for path in sorted((folder / "step-0-1").iterdir())
        ),
        *(
            Loader("certificate", folder / "fused" / name, _verify, sealed=name != "certificate.json", slow=True)
            for name in ("certificate.json", "config.json", "model.safetensors")
        ),
        *command,
    ]


def commands(folder: Path, documents: list[str]) -> Iterator[Loader]:
    """Every command, on each file that it reads: a model's folder, whole and in shards, and its own."""
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(documents, 270)
    model = build("llama", num_hidden_layers=1, vocab_size=len(tokenizer), eos_token_id=0)
    for name, size in (("model", "1GB"), ("shards", "4KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
    (folder / "corpus.txt").write_text("\n<|endoftext|>\n".join(documents * 20), encoding="utf-8")
    out = ("--out", folder / "out")
    text = (*("--corpus", folder / "corpus.txt"), *("--length", 8, "--blocks", 2, "--batch", 1))
    settings = f"model: {folder}/model\ndata: {{source: {folder}/corpus.txt, split: all}}\nlength: 8\nmethod: full\n"
    settings += f"training: {{output_dir: {folder}/trained, max_steps: 1, per_device_train_batch_size: 1}}\n"
    (folder / "run.yaml").write_text(settings, encoding="utf-8")
    plan = ("--batch", 1, "--length", 8, "--method", "full")
    for name in sorted(path.name for path in (folder / "model").iterdir()):
        yield from (
            Loader(
                "difference", folder / "model" / name, _command("difference", folder / "model", *text, *out), slow=True
            ),
            Loader("spectrum", folder / "model" / name, _command("spectrum", folder / "model", *out), slow=True),
        )
    for name in ("model.safetensors.index.json", sorted(path.name for path in (folder / "shards").glob("model-*"))[0]):
        yield Loader("spectrum", folder / "shards" / name, _command("spectrum", folder / "shards", *out), slow=True)
    yield Loader("plan", folder / "model" / "config.json", _command("plan", folder / "model", *plan))
    yield Loader(
        "plan", folder / "config.json", _command("plan", folder / "model", *plan, "--apex", folder / "config.json")
    )
    yield Loader("train", folder / "run.yaml", _command("train", folder / "run.yaml", "--overwrite"), slow=True)
    yield Loader("train", folder / "corpus.txt", _command("train", folder / "run.yaml", "--overwrite"), slow=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        yield Loader("train", folder / "model" / name, _command("train", folder / "run.yaml", "--overwrite"), slow=True)
    for how in ("--dry-run", "--list"):
        yield Loader(
            "reproduce", folder / "profile.yaml", _command("reproduce", how, "--profile", folder / "profile.yaml")
        )
    for name in ("certificate.json", "model.safetensors", "config.json"):
        yield Loader("verify", folder / "fused" / name, _command("verify", folder / "fused"), slow=True)
    with torch.no_grad():
        next(model.parameters())[3] += 1
    model.save_pretrained(folder / "tuned")
    base, update, made = folder / "model", folder / "update", folder / "made"
    export_update(base, folder / "tuned", update)
    yield Loader("apply-update", update, _command("apply-update", base, update, made, made=made))
    for path in (base / "model.safetensors", folder / "shards" / "model.safetensors.index.json"):
        command = _command("export-update", path.parent, folder / "tuned", made, made=made)
        yield Loader("export-update", path, command, slow=True)


def _command(*arguments: object, made: Path | None = None) -> Callable[[Path], None]:
    """Run a command line; what it says when it fails must be one line, or a table of checks.

    What it makes, `made`, is removed before it runs again.
    """

    def run(_: Path) -> None:
        if made and made.exists():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(each) for each in arguments])
        said = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        if code and len(said) + ("FAILED" in out.getvalue()) != 1:
            raise AssertionError(f"exit code {code}, {err.getvalue()[-300:]!r}")
        _refuse(" ".join(said))

    return run


def _resume(path: Path) -> None:
    RunFolder(path.parent).begin({"steps": 3}, resume=True, overwrite=False)


def _verify(path: Path) -> None:
    table = verify_folder(path.parent)
    _refuse("; ".join(table["detail"][~table["passed"]]))


def _refuse(reason: str) -> None:
    if reason:
        raise ValueError(reason)


def hostile(canary: Path) -> Iterator[bytes]:
    """Inputs that mean harm, for whichever loader."""
    command = f"touch '{canary}'"
    yield pickle.dumps(Canary(canary))
    yield b"\x80\x02" + pickle.dumps(Canary(canary), 2)[2:]
    yield f'!!python/object/apply:os.system ["{command}"]'.encode()
    yield f'model: !!python/object/new:os.system ["{command}"]\n'.encode()
    yield f'description: d\nnotebooks: !!python/name:os.system "{command}"\n'.encode()
    yield b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n".encode() for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
    yield from (b"[" * 200_000, b'{"a":' * 100_000, b"- " * 5_000, b"{" * 5_000, b"\x00" * 10_000, b"\xff\xfe" * 500)
    yield from (b"null", b"[]", b"{}", b"0", b'"text"', b"NaN", b"[null]", b"[[]]", b"{a: }", b"- 1\n- 2", b"1e999")
    yield b'{"layers": [{"layer": 0, "component": "head", "source": [0, 0], "target": [1], "direct": [], "units": 4}]}'
    yield b'{"layers": [{"layer": 1e9, "component": "head", "source": [99999999999999999999], "target": [0]}]}'
    yield b'{"format": 1, "files": {"../../model.safetensors": "0"}}'
    yield b'{"format": 1, "files": {"/etc/passwd": "0", "model.safetensors": "0"}}'
    yield b'{"format": 99, "files": {"model.safetensors": "0"}, "identity": {}}'
    yield b'{"format": 1, "files": [1], "identity": []}'
    yield b'{"tensor": "state.parameters.a"}'
    yield b'{"pairs": [["a", {"tensor": "../../x"}]]}'
    yield b'{"pairs": 3}'
    yield b'{"list": {"list": 1}}'
    yield b"9" * 5_000
    yield (2**62).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    yield (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'
    yield gzip.compress(b"\x00" * 20_000_000)
    yield b'{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["1"]}], "metadata": {}}'
    yield b'{"cells": [{"cell_type": "code", "metadata": [], "source": [1]}], "metadata": {"apexlib": 1}}'
    yield b'{"messages": [{"role": "system", "content": {"a": 1}}]}'
    yield b'{"text": "\\ud800"}'


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file cut off, emptied, with bits turned over, or parts doubled, dropped or replaced."""
    kind, start = draw.randrange(6), draw.randrange(max(1, len(content)))
    end = min(len(content), start + draw.randrange(1, 200))
    if kind == 0:
        return content[:start]
    if kind == 1:
        flipped = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 8))):
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return content[:start] + content[end:]
    if kind == 3:
        return content[:end] + content[start:]
    if kind == 4:
        return content[:start] + draw.randbytes(end - start) + content[end:]
    return draw.choice((b"", b"\n", content[: len(content) // 2] + b"\x00" * (len(content) - len(content) // 2)))


def judge(loader: Loader, changed: bytes, original: bytes, canary: Path) -> str:
    """What was wrong with the way a loader took an input; "" if nothing was."""
    fault, refused = "", False
    signal.alarm(SECONDS)
    try:
        loader.load(loader.path)
    except TimeoutError:
        fault = "hangs"
    except (ValueError, OSError) as error:
        refused = True
        if not str(error).strip() or len(str(error)) > 5_000:
            fault = f"says {len(str(error))} characters"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.alarm(0)
    if loader.sealed and not refused and changed != original:
        fault = fault or "loads a file that was changed"
    if canary.exists():
        canary.unlink()
        fault = "executes code"
    return fault


def _time_is_up(*_: object) -> None:
    raise TimeoutError


def fuzz(folder: Path, inputs: int, seed: int = 0) -> pd.DataFrame:
    """Try so many inputs over all loaders: one row per loader with `inputs`, `faulty` and one of the faults."""
    signal.signal(signal.SIGALRM, _time_is_up)
    canary, rows = folder / "canary", []
    found = loaders(folder / "files")
    for number, loader in enumerate(found):
        original, draw, faults = loader.path.read_bytes(), random.Random(1000 * seed + number), []
        wicked = list(hostile(canary))
        tries = [*wicked, *(damaged(original, draw) for _ in range(max(1, inputs // len(found) - len(wicked))))]
        if inputs < len(wicked) * len(found) or loader.slow:
            tries = draw.sample(tries, max(3, min(len(tries), inputs // len(found) // (4 if loader.slow else 1))))
        for changed in tries:
            loader.path.write_bytes(changed)
            if why := judge(loader, changed, original, canary):
                faults.append(f"{why} ← {changed[:60]!r}")
                kept = folder / f"{number} {loader.name} {len(faults)}.fault"
                kept.write_bytes(changed)
        loader.path.write_bytes(original)
        if resident_mb() * 1e6 > MEMORY:  # of this process: getrusage tells that of its parent if larger
            faults.append("takes more memory than it may")
        rows.append({"loader": loader.name, "inputs": len(tries), "faulty": len(faults), "fault": "".join(faults[:1])})
    table = pd.DataFrame(rows).groupby("loader", sort=False)
    return table.agg(inputs=("inputs", "sum"), faulty=("faulty", "sum"), fault=("fault", "max")).reset_index()


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    os.chdir(folder)  # where a path that was damaged into a relative one may be written
    fuzz(folder, int(sys.argv[2]), *map(int, sys.argv[3:])).to_csv(folder / "fuzz.csv", index=False)
