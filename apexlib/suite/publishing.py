"""Executed notebooks for readers: with their figures and tables, without what is of one machine or needs a kernel."""

import io
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apexlib.files import atomic_write

_WIDGET = "application/vnd.jupyter.widget-view+json"
_COLOURS = 96  # of a picture: figures have fewer that an eye tells apart, and take a quarter of the space


def publish(copy: Path, target: Path, *, root: Path, changed: Mapping[str, Any], **run: Any) -> None:
    """Write the executed `copy` of a notebook to `target`: its cells as they are, outputs cleaned.

    `changed` are parameters that had other values than stand in the notebook; `run`, told in the metadata, is what it
    was made with. Messages of libraries are left out, as are times, widgets (their pictures stay) and paths of `root`.
    """
    import nbformat

    notebook = nbformat.read(copy, as_version=4)
    cells = []
    for cell in notebook.cells:
        if "injected-parameters" in (tags := cell.metadata.get("tags", [])):
            if not changed:
                continue
            cell.source = "\n".join(["# changed for this run", *(f"{name} = {changed[name]!r}" for name in changed)])
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            told = (output for output in cell.outputs if output.get("name") != "stderr")
            cell.outputs = [output for output in told if _clean(output, str(root))]
        cells.append(cell)
    notebook.cells = cells
    kept = {name: notebook.metadata[name] for name in ("kernelspec", "language_info") if name in notebook.metadata}
    notebook.metadata = nbformat.from_dict({**kept, "run": run})
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        nbformat.write(notebook, temporary)


def _clean(output: Any, root: str) -> bool:
    """Clean an output in place; whether there is anything left of it."""
    if "text" in output:
        output["text"] = output["text"].replace(f"{root}/", "")
    data = output.get("data", {})
    data.pop(_WIDGET, None)
    for kind, value in data.items():
        if kind == "image/png":
            data[kind] = _with_fewer_colours(value)
        elif isinstance(value, str):
            data[kind] = value.replace(f"{root}/", "")
    return bool(data) or "data" not in output


def _with_fewer_colours(png: str) -> str:
    from PIL import Image

    smaller = io.BytesIO()
    with Image.open(io.BytesIO(b64decode(png))) as image:
        few = image.convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(smaller, "png", optimize=True)
    return min(b64encode(smaller.getvalue()).decode(), png, key=len)
