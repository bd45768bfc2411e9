"""Result files: never half written, always with provenance."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from apexlib import ApexConfig, files, provenance
from apexlib.suite import folders

ROOT = Path(__file__).parents[1]


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), files.atomic_write(path) as temporary:
        temporary.write_text("half \udc80", encoding="utf-8")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_a_failed_folder_leaves_the_old_one_and_no_debris(tmp_path):
    with files.atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(UnicodeEncodeError), files.atomic_folder(tmp_path / "a", replace=True) as temporary:
        (temporary / "x").write_text("half \udc80", encoding="utf-8")
    with pytest.raises(OSError, match="not empty"), files.atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("new")
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
    with files.atomic_folder(tmp_path / "a", replace=True) as temporary:
        (temporary / "y").write_text("new")
    assert os.listdir(tmp_path / "a") == ["y"]
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_in_place_was_flushed_with_the_folder_that_names_it(tmp_path, monkeypatch):
    opened, closed, really = {}, [], (os.open, os.close)

    def opening(path, *given, **options):
        handle = really[0](path, *given, **options)
        opened[handle, Path(path)] = None
        return handle

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "close", lambda handle: closed.append(handle) or really[1](handle))
    with files.atomic_write(tmp_path / "a" / "b" / "empty.json") as temporary:
        pass
    assert (tmp_path / "a" / "b" / "empty.json").read_bytes() == b""
    assert {path for _, path in opened} >= {temporary, tmp_path / "a" / "b"}
    with files.atomic_folder(tmp_path / "x" / "y" / "z") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").touch()
    parts = {temporary, temporary / "inner", temporary / "inner" / "file", tmp_path / "x" / "y"}
    assert {path for _, path in opened} >= parts
    assert {handle for handle, _ in opened} == {*closed}


def test_an_object_is_written_so_that_it_can_be_read_and_compared(tmp_path):
    path = files.write_json({"b": "ü", "a": {"d": 1, "c": 2}}, tmp_path / "a.json")
    assert path.read_text(encoding="utf-8") == '{\n  "a": {\n    "c": 2,\n    "d": 1\n  },\n  "b": "ü"\n}\n'


def test_other_values_have_another_hash():
    hashes = [files.content_hash(value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, [1], None)]
    assert {len(each) for each in hashes} == {64}
    assert len({*hashes}) == len(hashes)


def test_nothing_is_loaded_that_could_run_and_what_goes_wrong_is_told():
    def kind(name, error=None):
        def load(_, **options):
            if error:
                raise error
            return options

        return type(name, (), {"from_pretrained": staticmethod(load), "from_config": staticmethod(load)})

    assert files.pretrained(kind("AutoTokenizer"), "a") == {"trust_remote_code": False}
    loaded = files.pretrained(kind("AutoModel"), "a", dtype="auto")
    assert loaded == {"trust_remote_code": False, "use_safetensors": True, "dtype": "auto"}
    config = SimpleNamespace(model_type="llama")
    for error in (OSError("gone"), ValueError("bad"), ImportError("no such")):
        with pytest.raises(type(error), match=f"^{error}$"):
            files.pretrained(kind("AutoModel", error), "a")
    for error in (ValueError("bad"), ImportError("no such")):
        with pytest.raises(type(error), match=f"^{error}$"):
            files.untrained(kind("AutoModel", error), config)
    with pytest.raises(ValueError, match="a: not loaded, KeyError: 'x'"):
        files.pretrained(kind("AutoModel", KeyError("x")), "a")
    with pytest.raises(ValueError, match="llama: no model can be made of its configuration, KeyError: 'x'"):
        files.untrained(kind("AutoModel", KeyError("x")), config)


def test_only_what_an_unfinished_write_left_is_cleared(tmp_path):
    (tmp_path / ".partial-a-x").mkdir()
    (tmp_path / ".partial-b").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    more = [tmp_path / f".partial-c-{letter}" for letter in "qwertzuiop"]
    for path in more:
        path.touch()
    assert files.clear_partial(tmp_path) == [tmp_path / ".partial-a-x", tmp_path / ".partial-b", *sorted(more)]
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(tmp_path / "kept") == ["file"]


@pytest.mark.parametrize("write", [ApexConfig().to_json, lambda path: files.write_json({"a": 1}, path)])
def test_a_disk_that_fills_up_leaves_the_old_file(write, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_lock_is_let_go_at_the_end(tmp_path):
    with files.exclusive(tmp_path / "lock"), pytest.raises(BlockingIOError), files.exclusive(tmp_path / "lock"):
        pass
    with files.exclusive(tmp_path / "a" / "b" / "lock"), files.exclusive(tmp_path / "lock"):
        pass


def test_a_saved_table_carries_its_provenance_and_hash(tmp_path):
    path = provenance.save_table(
        pd.DataFrame({"a": [1, 2], "b": [0.1, float("nan")]}), "t", tmp_path, data={"x": "1"}, seed=3
    )
    pd.testing.assert_frame_equal(pd.read_csv(path), pd.DataFrame({"a": [1, 2], "b": [0.1, float("nan")]}))
    facts = json.loads((tmp_path / "t.json").read_text())
    assert facts["sha256"] == files.file_hash(path)
    assert (facts["rows"], facts["seed"], facts["data"]) == (2, 3, {"x": "1"})
    assert {"commit", "created", "device", "python", "versions"} <= set(facts)
    assert facts["versions"]["pandas"] == pd.__version__


def test_a_table_has_nine_digits_and_its_time_is_in_seconds(tmp_path):
    path = provenance.save_table(pd.DataFrame({"a": [1 / 3]}), "t", tmp_path)
    assert path.read_bytes() == b"a\n0.333333333\n"
    created = json.loads((tmp_path / "t.json").read_text())["created"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", created)


@pytest.mark.parametrize(
    ("commit", "status", "modified"), [("c", "", False), ("c", " M a", True), ("c", None, None), (None, " M a", None)]
)
def test_a_source_is_modified_or_not_where_git_can_tell(commit, status, modified, monkeypatch):
    told = {"rev-parse": commit, "status": status}
    monkeypatch.setattr(provenance, "git", lambda folder, command, *_: told[command])
    found = provenance.provenance()
    assert (found["commit"], found["source_modified"]) == (commit, modified)


def test_git_tells_nothing_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git(tmp_path, "rev-parse", "HEAD") is None
    assert provenance.git(tmp_path, "no-such-command") is None


def test_the_device_is_told_with_what_torch_has_of_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert provenance.provenance()["device"] == "cpu, 7 threads"
    monkeypatch.delitem(sys.modules, "torch")
    assert provenance.provenance()["device"] == "cpu"


def test_of_a_package_that_is_found_twice_the_first_counts_as_in_an_import(monkeypatch):
    found = {"torch": ["2.1", "1.0"]}
    twice = lambda name: (SimpleNamespace(version=version) for version in found.get(name, ()))  # noqa: E731
    monkeypatch.setattr(provenance.metadata, "distributions", twice)
    assert provenance.provenance()["versions"] == {"torch": "2.1"}


def test_an_empty_table_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="table 't' has no rows"):
        provenance.save_table(pd.DataFrame({"a": []}), "t", tmp_path)
    assert not os.listdir(tmp_path)


def test_provenance_only_reads_the_repository(tmp_path, monkeypatch):
    index = tmp_path / "index"
    monkeypatch.setenv("GIT_INDEX_FILE", str(index))
    listed = subprocess.run(["git", "read-tree", "HEAD"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not in a git checkout")
    before = index.read_bytes()  # knows no file's time, so that git would like to write it anew, under a lock
    assert len(provenance.provenance()["commit"]) == 40
    assert index.read_bytes() == before


def test_provenance_holds_no_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    assert "a-secret-token" not in json.dumps(provenance.provenance())


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b"])
def test_a_profile_name_cannot_leave_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match="names a folder"):
        folders.folders(name, tmp_path)


def test_the_root_is_found_from_below_and_its_absence_named(tmp_path):
    (tmp_path / "notebooks" / "deep").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="not inside the project"):
        folders.project_root(tmp_path / "notebooks")
    (tmp_path / "pyproject.toml").touch()
    assert folders.project_root(tmp_path / "notebooks" / "deep") == tmp_path.resolve()


def test_what_the_study_says_of_one_s_own_text_is_in_its_tables():
    """docs/study.md: outside the gate, every method at the grid's highest rate, full fine-tuning ahead all along it."""
    folder = ROOT / "data" / "results" / "own-25m"
    gate, runs = (pd.read_csv(folder / f"instruction{name}.csv") for name in ("_gate", ""))
    assert not gate["holds"].all()
    tuned = runs[runs["method"] != "base"]
    assert (tuned.loc[tuned["chosen"], "learning_rate"] == tuned["learning_rate"].max()).all()
    grid = tuned[tuned["seed"].isin([0, 1, 2])].groupby(["method", "learning_rate"])[["valid_loss", "retention_loss"]]
    along = grid.mean().sort_index()
    full = along.loc["full"]
    for method in ("apex", "lora"):
        assert (along.loc[method, "valid_loss"] > full["valid_loss"]).all()
        matched = along.loc[method][along.loc[method, "retention_loss"].between(*full["retention_loss"].iloc[[0, -1]])]
        assert len(matched) > 1
        learnt = np.interp(matched["retention_loss"], full["retention_loss"], full["valid_loss"])
        assert (matched["valid_loss"] > learnt).all()
