"""What is published of an executed notebook: all that a reader sees, nothing of the machine that ran it."""

import io
import json
from base64 import b64decode, b64encode
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from apexlib.suite.publishing import publish

ROOT = Path(__file__).parents[1]
KERNEL = {"name": "python3", "display_name": "Python 3"}
PUBLISHED = sorted((ROOT / "notebooks" / "executed").glob("*/*.ipynb"))


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return b64encode(file.getvalue()).decode()


def pixels_of(text):
    return np.asarray(Image.open(io.BytesIO(b64decode(text))).convert("RGB"))


@pytest.fixture
def executed(tmp_path):
    """A copy as papermill leaves it, with one output of each kind."""
    gradient = np.linspace(0, 255, 200 * 300 * 3).reshape(200, 300, 3).astype(np.uint8)
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "abc"}}
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a warning of some library"),
        nbformat.v4.new_output("stream", name="stdout", text=f"read {tmp_path}/data/a.csv"),
        nbformat.v4.new_output("display_data", data=widget),
        nbformat.v4.new_output("display_data", data={**widget, "image/png": png(gradient), "text/plain": "View"}),
        nbformat.v4.new_output("execute_result", data={"text/html": f"<p>{tmp_path}/figures</p>"}, execution_count=3),
    ]
    times = {"papermill": {"duration": 1.0}, "execution": {"iopub.execute_input": "2026"}, "tags": ["explore"]}
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# Why?", metadata={"papermill": {}}),
        nbformat.v4.new_code_cell("n: int = 1", metadata={"tags": ["parameters"]}, execution_count=1),
        nbformat.v4.new_code_cell("n = 2\nm = 3", metadata={"tags": ["injected-parameters"]}, execution_count=2),
        nbformat.v4.new_code_cell("show()", metadata=times, outputs=outputs, execution_count=3),
    ]
    notebook.metadata = {"kernelspec": KERNEL, "papermill": {"input_path": str(tmp_path)}, "widgets": {}}
    copy = tmp_path / "copy.ipynb"
    nbformat.write(notebook, copy)
    return copy


def published(copy, **options):
    target = copy.parent / "out" / copy.name
    publish(copy, target, root=copy.parent, **{"changed": {}, "commit": "c0ffee"} | options)
    nbformat.validate(notebook := nbformat.read(target, 4))
    return notebook, target.read_text(encoding="utf-8")


def test_nothing_of_the_machine_or_of_the_run_stays(executed):
    notebook, text = published(executed)
    for noise in (str(executed.parent), "papermill", "widget", "some library", "2026", "model_id"):
        assert noise not in text
    assert notebook.metadata == {"kernelspec": KERNEL, "run": {"commit": "c0ffee"}}
    assert [cell.source for cell in notebook.cells] == ["# Why?", "n: int = 1", "show()"]
    kinds = [sorted(output.get("data", {"stream": 0})) for output in notebook.cells[-1].outputs]
    assert kinds == [["stream"], ["image/png", "text/plain"], ["text/html"]]
    assert notebook.cells[-1].outputs[0].text == "read data/a.csv"
    assert notebook.cells[-1].metadata == {"tags": ["explore"]}


def test_values_that_differ_from_the_notebook_are_shown_and_no_others(executed):
    notebook, _ = published(executed, changed={"m": [3, "x"]})
    assert notebook.cells[2].source == "# changed for this run\nm = [3, 'x']"


def test_a_picture_keeps_its_size_and_nearly_its_colours_and_never_grows(executed):
    before = nbformat.read(executed, 4).cells[-1].outputs[3].data["image/png"]
    notebook, _ = published(executed)
    after = notebook.cells[-1].outputs[1].data["image/png"]
    old, new = pixels_of(before), pixels_of(after)
    assert old.shape == new.shape
    assert np.abs(old.astype(int) - new).mean() < 4
    assert len(after) <= len(before)


def test_figures_of_few_colours_keep_every_pixel(executed):
    flat = np.zeros((50, 80, 3), np.uint8)
    flat[10:20], flat[:, 30:40] = (213, 94, 0), (0, 114, 178)
    notebook = nbformat.read(executed, 4)
    notebook.cells[-1].outputs[3].data["image/png"] = png(flat)
    nbformat.write(notebook, executed)
    shown, _ = published(executed)
    assert np.array_equal(pixels_of(shown.cells[-1].outputs[1].data["image/png"]), flat)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_is_published_here_is_whole_clean_and_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    for noise in ("/home/", "/root/", "/tmp/", "/Users/", "widget-view", "papermill"):
        assert noise not in text
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code if cell["source"])
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert {"commit", "created", "device", "profile"} <= json.loads(text)["metadata"]["run"].keys()
