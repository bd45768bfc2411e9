"""A place to play in JupyterLab: copies of the notebooks that write to folders of their own, on recorded tables.

What lies there is the user's and no part of the project: what was changed is never written over.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from apexlib.files import atomic_write, content_hash, read_object, write_json
from apexlib.suite.folders import PLAY, folders
from apexlib.suite.notebooks import read_profile

_PROFILE = re.compile(rb'(profile: str = \\")[^"\\]*')  # as JSON has it
_WRITTEN = ".written.json"  # hashes of the files as they were written


def lay_out(root: Path, recorded: str = "cpu") -> Iterator[str]:
    """Lay out `play/`, an index page and a copy of each notebook; say what is new and what was left as it was.

    Copies start from the tables of the run of profile `recorded`: these are laid out too, beside their results. What
    the user has not changed follows the project; what was removed comes again.
    """
    note, written = root / PLAY / _WRITTEN, {}
    with suppress(OSError, ValueError):  # absent or damaged: then nothing counts as unchanged
        written = read_object(note)
    notebooks = {root / PLAY / "index.ipynb": _index(root), **dict(_copies(root, recorded))}
    for target, content in (notebooks | dict(_tables(root, recorded))).items():
        name, new = target.relative_to(root).as_posix(), _hash(content)
        found = _hash(target.read_bytes()) if target.exists() else None
        if found in (None, written.get(name)) and found != new:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as temporary:
                temporary.write_bytes(content)
            found = new
            if target in notebooks:
                yield f"{name}: new"
        if found == new:
            written[name] = new
        elif target in notebooks and written.get(name) != new:
            yield f"{name}: left as you changed or ran it; it is another in the project now, remove it for that"
    write_json(written, note)


def _hash(content: bytes) -> str:
    """A notebook's by its cells with their outputs: to open it in JupyterLab changes the rest."""
    with suppress(ValueError, KeyError, TypeError):
        cells = json.loads(content)["cells"]
        return content_hash([[cell["cell_type"], "".join(cell["source"]), cell.get("outputs")] for cell in cells])
    return hashlib.sha256(content).hexdigest()


def _copies(root: Path, profile: str) -> Iterator[tuple[Path, bytes]]:
    """The notebooks that a profile names; others in the same folder may be anybody's."""
    folder = root / "notebooks"
    for name in sorted(read_profile(profile, folder / "profiles").notebooks):
        if (source := folder / f"{name}.ipynb").is_file():
            yield root / PLAY / source.name, _PROFILE.sub(rb"\g<1>" + PLAY.encode(), source.read_bytes(), count=1)


def _tables(root: Path, profile: str) -> Iterator[tuple[Path, bytes]]:
    source, target = folders(profile, root), folders(PLAY, root)
    for here, there in ((source.results, target.results), (source.figures, target.figures)):
        for file in (file for kind in ("csv", "json") for file in sorted(here.glob(f"*.{kind}"))):
            if file.name != "manifest.json":
                yield there / file.name, file.read_bytes()


def _index(root: Path) -> bytes:
    import nbformat

    page = (root / "docs" / "play.md").read_text(encoding="utf-8").replace("](../notebooks/", "](")  # to the copies
    cells = [nbformat.v4.new_markdown_cell(page, id="page")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return f"{nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=kernel))}\n".encode()
