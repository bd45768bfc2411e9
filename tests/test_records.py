"""Result files: never half written, always with provenance."""

import json
import os

import pandas as pd
import pytest

from apexlib import records


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), records.atomic_write(path) as temporary:
        temporary.write_text("half \udc80", encoding="utf-8")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]
    with records.atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_a_saved_table_carries_its_provenance_and_hash(tmp_path):
    path = records.save_table(
        pd.DataFrame({"a": [1, 2], "b": [0.1, float("nan")]}), "t", tmp_path, data={"x": "1"}, seed=3
    )
    pd.testing.assert_frame_equal(pd.read_csv(path), pd.DataFrame({"a": [1, 2], "b": [0.1, float("nan")]}))
    facts = json.loads((tmp_path / "t.json").read_text())
    assert facts["sha256"] == records.file_hash(path)
    assert (facts["rows"], facts["seed"], facts["data"]) == (2, 3, {"x": "1"})
    assert {"commit", "created", "device", "python", "versions"} <= set(facts)
    assert facts["versions"]["pandas"] == pd.__version__


def test_an_empty_table_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="table 't' has no rows"):
        records.save_table(pd.DataFrame({"a": []}), "t", tmp_path)
    assert not os.listdir(tmp_path)


def test_provenance_holds_no_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-token")
    assert "a-secret-token" not in json.dumps(records.provenance())


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b"])
def test_a_profile_name_cannot_leave_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match="names a folder"):
        records.folders(name, tmp_path)


def test_the_root_is_found_from_below_and_its_absence_named(tmp_path):
    (tmp_path / "notebooks" / "deep").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="not inside the project"):
        records.project_root(tmp_path / "notebooks")
    (tmp_path / "pyproject.toml").touch()
    assert records.project_root(tmp_path / "notebooks" / "deep") == tmp_path.resolve()
