"""Views and notebooks in JupyterLab, as `make lab` opens it, in a real browser (`make test-browser`)."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from apexlib.suite.notebooks import read_profile

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
WIDTHS = (1000, 1600)  # pixels of a window
PATIENCE = 300  # seconds for what takes a few on a machine that does nothing else
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SETTINGS = {  # of this JupyterLab: it asks nobody about news, and holds all cells of a notebook
    "labconfig/page_config.json": {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}},
    "lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}
SMALL = read_profile("smoke", ROOT / "notebooks" / "profiles").notebooks  # values of each notebook, for a quick run

BASE = """
import torch
from apexlib import activation_statistics, explore, select, weight_difference
from apexlib.suite.inputs import load_model, load_tokenizer

folder = "../data/models/python-3m"
base, younger = (load_model(path, dtype=torch.float32) for path in (folder, f"{folder}/step-00425"))
tokenizer = load_tokenizer(folder)
ids = tokenizer(open("../apexlib/plan.py").read(), return_tensors="pt")["input_ids"][:, : 8 * 128].view(8, 128)
blocks = [{"input_ids": part} for part in ids.split(2)]
at_work = {"model": base, "tokenizer": tokenizer, "text": blocks[:1]}
statistics = {"step 425": activation_statistics(younger, blocks), "last": activation_statistics(base, blocks)}
"""
VIEWS = {
    "masks": "explore.masks(**at_work)",
    "units": "explore.units(statistics, select(statistics['last']), weight_difference(base, younger), **at_work)",
    "expansion": "explore.expansion(base, blocks, statistics['last'])",
    "spectrum": "explore.spectrum(folder, {'step 425': f'{folder}/step-00425', 'step 1700': f'{folder}/step-01700'})",
    "runs": "explore.runs('../data/results/cpu')",
}
# of each view every control, and what is done to it: a number of keys pressed in a slider, a choice, or a text; those
# whose name ends in "*" change pictures alone
CONTROLS = {
    "masks": {
        "component": "head", "share": 20, "sequence": "1", "after token": "40", "layers": ["1", "3"],
        "order": "by hand", "by hand": "0, 4-7",
    },
    "units": {
        "checkpoint": -1, "channel ranks*": 40, "component": "head", "head ranks*": 2, "colour*": "movement",
        "layer": "2", "unit": "5", "by hand*": "0-2 > 3-5",
    },
    "expansion": {
        "weight*": "model.layers.2.self_attn.v_proj", "steps": 1, "operator": "diagonal", "fraction (K)": -4,
        "direct heads": 20, "direct channels": 12,
    },
    "spectrum": {"weight": "model.layers.1.mlp.up_proj", "models": ["step 1700"]},
    "runs": {
        "claim": "19: APEX with 2.4 %", "verdict": "reproduced", "words": "heads", "measure*": "retention_loss",
        "methods*": ["full", "lora"],
    },
}  # fmt: skip


class Lab(NamedTuple):
    """A JupyterLab that `make lab` started in a clone of the project, one of whose notebooks is up to date."""

    address: str
    root: Path
    plan: str  # of the next run, before anything was done in the browser


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    root = tmp_path_factory.mktemp("lab") / "project"
    for name in _said("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).split("\0"):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    for name, values in SETTINGS.items():
        (path := root.with_name("config") / name).parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --port={port} --ServerApp.port_retries=0 --IdentityProvider.token= --allow-root"
    made = {"RUN": sys.executable, "STAMP": ".git/ready", "ARGS": options}  # these packages, instead of new ones
    command = ["make", "lab", *(f"{name}={value}" for name, value in made.items())]
    with pytest.MonkeyPatch.context() as patch, root.with_name("lab.log").open("w+") as log:
        own = {"JUPYTER_CONFIG_DIR": root.with_name("config"), "JUPYTER_RUNTIME_DIR": root.with_name("runtime")}
        for name, value in (own | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}).items():
            patch.setenv(name, str(value))
        _said(sys.executable, "-m", "apexlib", "reproduce", "--only", "07", cwd=root)
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "all"]):
            _said("git", *words, cwd=root)
        (root / ".git" / "ready").touch()
        server = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(lambda: server.poll() is not None or _answers(f"http://127.0.0.1:{port}/api"), "an answer")
            assert server.poll() is None, log.seek(0) or log.read()
            yield Lab(f"http://127.0.0.1:{port}", root, planned(root))
        finally:
            with suppress(ProcessLookupError):  # it has ended, and said why
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not (found := next(filter(None, map(shutil.which, BROWSERS)), None)):
        pytest.skip(f"no browser: need one of {', '.join(BROWSERS)}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pictures(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    yield folder
    request.config.get_terminal_writer().line(f"\npictures of each view: {folder}")


def planned(root: Path) -> str:
    """What `make reproduce ARGS=--dry-run` says, of all notebooks and of the one that has run."""
    command = [sys.executable, "-m", "apexlib", "reproduce", "--dry-run"]
    return _said(*command, cwd=root) + _said(*command, "--only", "07", cwd=root)


def _said(*command: str, cwd: Path) -> str:
    """What a command says, that must not fail."""
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True).stdout


def _answers(address: str) -> bool:
    try:
        return urlopen(address, timeout=5).status == 200
    except (URLError, TimeoutError):
        return False


def _wait(until: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.2)


def _whole(notebook):
    """Whether a notebook that somebody may be writing is there to its end."""
    with suppress(nbformat.reader.NotJSONError):
        return nbformat.read(notebook, as_version=4)
    return None


def choose(page, menu, entry):
    """Choose an entry of a menu."""
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()


def open_notebook(page, lab, name):
    """Open a notebook of the folder to play in; return where it lies."""
    page.goto(f"{lab.address}/lab/workspaces/{name}/tree/play/{name}.ipynb?reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    return lab.root / "play" / f"{name}.ipynb"


def run_all(page, notebook, seconds=2 * PATIENCE):
    """Choose Run > Run All Cells, wait until no cell waits any more, save, and return the cells and their errors."""
    counts = page.locator(".jp-CodeCell .jp-InputArea-prompt")
    choose(page, "Run", "Run All Cells")
    _wait(lambda: counts.first.inner_text() != "[ ]:" and "[*]:" not in counts.all_inner_texts(), "the cells", seconds)
    before = notebook.stat().st_mtime_ns
    choose(page, "File", "Save Notebook")
    _wait(lambda: notebook.stat().st_mtime_ns > before and _whole(notebook), "the notebook to be saved")
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    failed = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert failed or all(cell.execution_count for cell in cells)
    return cells, ["\n".join(output.traceback) for output in failed]


def shown(page):
    """Pictures and words of the view, and what it says in one line."""
    view = page.locator(".apex-view")
    images = view.locator("img").evaluate_all("all => all.map(one => one.src)")
    said, *_, words = view.locator(".widget-html-content").evaluate_all("all => all.map(one => one.innerHTML)")
    return images, words, said


def move(page, name, to):
    """Do to a control what a hand would."""
    row = page.locator(".apex-view .widget-label", has_text=re.compile(f"^{re.escape(name)}$")).locator("xpath=..")
    if isinstance(to, int):
        row.locator(".noUi-handle").first.focus()
        for _ in range(abs(to)):
            page.keyboard.press("ArrowRight" if to > 0 else "ArrowLeft")
    elif (choices := row.locator("select")).count():
        texts = [text.replace("\xa0", " ") for text in choices.locator("option").all_inner_texts()]
        starts = (to,) if isinstance(to, str) else to
        choices.select_option(index=[[text.startswith(start) for text in texts].index(True) for start in starts])
    else:
        row.locator("input").fill(to)
        page.keyboard.press("Enter")


def changed(page, before, what):
    """Wait until the view shows other pictures and is done, also with what was asked of it meanwhile; return them."""
    seen = [before]

    def settled():
        page.wait_for_timeout(500)
        seen.append(shown(page))
        return seen[-1] == seen[-2] and seen[-1][0] != before[0] and seen[-1][2] != "…"

    _wait(settled, f"pictures to follow {what}")
    return seen[-1]


def stroke(page, number, *corners):
    """Draw a pointer over a picture, between corners as shares of its size; return what makes pixels of shares."""
    box = page.locator(".apex-view img").nth(number).bounding_box()

    def at(x, y):
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    if corners:
        page.mouse.move(*at(*corners[0]))
        page.mouse.down()
        page.mouse.move(*at(*corners[1]), steps=5)
        page.mouse.up()
    return at


@pytest.fixture
def window(browser):
    """Open a window of a width; when all is done, its kernel is shut down, and nothing has failed in it."""
    pages, failures = [], []

    def open_window(width=WIDTHS[-1]):
        pages.append(browser.new_page(viewport={"width": width, "height": 1300}))
        pages[-1].set_default_timeout(1000 * PATIENCE)
        pages[-1].on("pageerror", lambda error: failures.append(str(error)))
        return pages[-1]

    yield open_window
    for page in pages:
        choose(page, "Kernel", "Shut Down Kernel")
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(state="detached")
        page.close()
    assert failures == []


@pytest.fixture
def opened(lab, window):
    """Open a view, in a notebook of its own."""

    def open_view(name, width=WIDTHS[-1]):
        cells = [nbformat.v4.new_code_cell(text) for text in (BASE.strip(), VIEWS[name])]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab.root / "play" / f"{name}.ipynb")
        page = window(width)
        assert run_all(page, open_notebook(page, lab, name))[1] == []
        _wait(lambda: len(shown(page)[0]) > 1, "the view")
        return page

    return open_view


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", VIEWS)
def test_every_control_of_a_view_moves_its_pictures_and_numbers(name, width, opened, pictures):
    page = opened(name, width)
    labels = page.locator(".apex-view .widget-label").all_inner_texts()
    assert {label for label in labels if label} == {label.removesuffix("*") for label in CONTROLS[name]}
    page.locator(".apex-view").scroll_into_view_if_needed()
    page.screenshot(path=pictures / f"{name}-{width}.png")
    for label, to in CONTROLS[name].items():
        before = shown(page)
        move(page, label.removesuffix("*"), to)
        after = changed(page, before, label)
        assert after[2] == "", label
        assert label.endswith("*") or after[1] != before[1], label
    page.screenshot(path=pictures / f"{name}-{width}-moved.png")


def test_a_pointer_over_the_map_of_units_tells_shows_and_chooses(opened):
    page = opened("units")
    at = stroke(page, 0)
    page.mouse.move(*at(0.3, 0.3))
    _wait(lambda: "rank_score" in shown(page)[2], "words about a unit")
    told, before = shown(page)[2], shown(page)
    page.mouse.click(*at(0.3, 0.3))
    assert changed(page, before, "a click")[1].startswith(before[1][:20])
    assert told in shown(page)[1]  # the same unit
    before = shown(page)
    stroke(page, 1, (0.3, 0.5), (0.5, 0.5))
    changed(page, before, "a stroke over ranks")
    before = shown(page)
    stroke(page, 0, (0.2, 0.3), (0.25, 0.7))
    changed(page, before, "a stroke")
    assert re.fullmatch(
        r"\d+-\d+ > [\d, ]+", page.locator(".apex-view input[placeholder='sources > targets']").input_value()
    )


def test_a_stroke_masks_units_and_a_click_on_a_token_asks_what_follows(opened):
    page = opened("masks")
    before = shown(page)
    stroke(page, 2, (0.4, 0.3), (0.6, 0.5))
    changed(page, before, "a stroke")
    assert page.locator(".apex-view select").nth(1).input_value().replace("\xa0", " ") == "by hand"
    before = shown(page)
    page.locator(".apex-view [data-token='30']").click()
    assert changed(page, before, "a click on a token")[1] != before[1]
    assert page.locator(".apex-view input[type=number]").last.input_value() == "30"


def test_a_notebook_that_goes_on_from_another_says_so_in_a_line(lab, window):
    page = window()
    _, (said,) = run_all(page, open_notebook(page, lab, "05_effective_rank"))
    assert re.fullmatch(r"NotReadyError: data/models/.* are not there; run notebook 03 first", said)


@pytest.mark.parametrize("values", ["smoke", pytest.param("own", marks=pytest.mark.slow)])
@pytest.mark.parametrize("notebook", SMALL)  # in this order: some go on from others
def test_a_notebook_runs_by_the_menu(notebook, values, lab, window):
    copy = lab.root / "play" / f"{notebook}.ipynb"
    changed_values = SMALL[notebook] if values == "smoke" else {}
    nbformat.write(parameterize_notebook(load_notebook_node(str(copy)), changed_values), copy)
    page = window()
    cells, failed = run_all(page, open_notebook(page, lab, notebook), 2 * PATIENCE if values == "smoke" else 3600)
    assert failed == []
    views = sum("explore" in cell.metadata.get("tags", []) for cell in cells)
    _wait(lambda: page.locator(".apex-view").count() == views, "its views")


def test_copies_are_duplicated_and_edited_and_the_project_stays_as_it_was(lab, window):
    page = window()
    page.goto(lab.address)
    page.get_by_role("link", name="02 Expansion step by step").click()
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    choose(page, "File", "Duplicate Notebook")
    copy = lab.root / "play" / "02_expansion_step_by_step-Copy1.ipynb"
    _wait(copy.exists, "the duplicate")
    open_notebook(page, lab, copy.stem)
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Control+End")
    page.keyboard.type("\nsteps = 3")
    cells, failed = run_all(page, copy)
    assert failed == []
    assert cells[0].source.endswith("\nsteps = 3")
    assert planned(lab.root) == lab.plan
    assert lab.plan.endswith("skip   up to date\n")
    assert _said("git", "status", "--porcelain", cwd=lab.root) == ""
