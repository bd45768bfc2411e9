"""A place to play in JupyterLab: copies of the notebooks that write to folders of their own, on recorded tables.

What is in `play/` is the user's and no part of the project: a copy that was changed is never written over.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from apexlib.files import atomic_write, content_hash, read_object, write_json
from apexlib.suite.folders import PLAY, folders
from apexlib.suite.notebooks import read_notebook

_PROFILE = 'profile: str = "{}"'
_INDEX = "index.ipynb"
_WRITTEN = ".written.json"  # hashes of the copies as they were written


def lay_out(root: Path, recorded: str = "cpu") -> Iterator[str]:
    """Lay out `play/`: an index page and a copy of each notebook; say what is new and what was left alone.

    Copies start from the tables of the run of profile `recorded`, as far as there are none of their own yet.
    """
    folder, written = root / PLAY, {}
    folder.mkdir(exist_ok=True)
    if (folder / _WRITTEN).is_file():
        written = read_object(folder / _WRITTEN)
    for path, text in {_INDEX: _index(root), **dict(_copies(root))}.items():
        target, hashed = folder / path, content_hash(text)
        found = content_hash(target.read_text(encoding="utf-8")) if target.exists() else None
        if found == hashed:
            written[path] = hashed
        elif found is None or found == written.get(path):
            yield f"{PLAY}/{path}: new"
            with atomic_write(target) as temporary:
                temporary.write_text(text, encoding="utf-8")
            written[path] = hashed
        elif written.get(path) != hashed:
            yield f"{PLAY}/{path}: left as you changed it; it has changed in the project too, remove it for a new one"
    write_json(written, folder / _WRITTEN)
    from_record, own = folders(recorded, root), folders(PLAY, root)
    for source, target in ((from_record.results, own.results), (from_record.figures, own.figures)):
        for file in (file for kind in ("csv", "json") for file in source.glob(f"*.{kind}")):
            if not (target / file.name).exists() and file.name != "manifest.json":
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / file.name)


def _copies(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        was = read_notebook(path, PLAY).parameters["profile"].default
        said, plays = (_PROFILE.format(name).replace('"', '\\"') for name in (was, PLAY))
        yield path.name, path.read_text(encoding="utf-8").replace(said, plays, 1)


def _index(root: Path) -> str:
    import nbformat

    page = (root / "docs" / "play.md").read_text(encoding="utf-8").replace("](../notebooks/", "](")  # to the copies
    cells = [nbformat.v4.new_markdown_cell(page, id="page")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=kernel)) + "\n"
