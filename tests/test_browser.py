"""Views and notebooks in JupyterLab, in a real browser: every control moves what is shown (`make test-browser`)."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[1]
WIDTHS = (1000, 1600)  # pixels of a window
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SETTINGS = {  # of this JupyterLab: it asks nobody about news, and holds all cells of a notebook
    "jupyter_config_dir/labconfig/page_config.json": {
        "disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}
    },
    "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
}
QUICK = ("02", "07")  # notebooks that run in a minute
NOTEBOOKS = [
    pytest.param(path.name, id=path.stem, marks=() if path.name.startswith(QUICK) else pytest.mark.slow)
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
]

BASE = """
import torch
from apexlib import activation_statistics, explore, select, weight_difference
from apexlib.suite.inputs import load_model, load_tokenizer

folder = "data/models/python-3m"
base, younger = (load_model(path, dtype=torch.float32) for path in (folder, f"{folder}/step-00425"))
tokenizer = load_tokenizer(folder)
ids = tokenizer(open("apexlib/plan.py").read(), return_tensors="pt")["input_ids"][:, : 8 * 128].view(8, 128)
blocks = [{"input_ids": part} for part in ids.split(2)]
at_work = {"model": base, "tokenizer": tokenizer, "text": blocks[:1]}
statistics = {"step 425": activation_statistics(younger, blocks), "last": activation_statistics(base, blocks)}
"""
VIEWS = {
    "masks": "explore.masks(**at_work)",
    "units": "explore.units(statistics, select(statistics['last']), weight_difference(base, younger), **at_work)",
    "expansion": "explore.expansion(base, blocks, statistics['last'])",
    "spectrum": "explore.spectrum(folder, {'step 425': f'{folder}/step-00425', 'step 1700': f'{folder}/step-01700'})",
    "runs": "explore.runs('data/results/cpu')",
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
        "claim": "19: APEX with 2.4 %", "verdict": "opposite", "words": "heads", "measure*": "retention_loss",
        "methods*": ["full", "lora"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a JupyterLab that runs on a copy of the project, as `make lab` starts it, and that copy."""
    root = tmp_path_factory.mktemp("lab") / "project"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    own = {name: str(root.with_name(name.lower())) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    own |= {f"JUPYTERLAB_{name}_DIR": str(root.with_name(name.lower())) for name in ("SETTINGS", "WORKSPACES")}
    environment = os.environ | own | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    for name, values in SETTINGS.items():
        (path := root.parent / name).parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    subprocess.run([sys.executable, "-m", "apexlib", "play"], cwd=root, env=environment, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={root}", "--allow-root"]
    with root.with_name("server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
        try:
            _wait(lambda: _answers(f"http://127.0.0.1:{port}/api"), 60, "JupyterLab to answer")
            yield f"http://127.0.0.1:{port}", root
        finally:
            server.terminate()
            server.wait(30)


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


def _answers(address: str) -> bool:
    try:
        return urlopen(address, timeout=5).status == 200
    except (URLError, TimeoutError):
        return False


def _wait(until: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.2)


def run_all(page, address, notebook, seconds):
    """Open a notebook in JupyterLab, choose Run > Run All Cells, and wait for its end."""
    page.goto(f"{address}/lab/workspaces/{Path(notebook).stem}/tree/{notebook}?reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    counts = page.locator(".jp-CodeCell .jp-InputArea-prompt")
    _wait(lambda: _executed(counts.all_inner_texts()) or errors(page), seconds, "the last cell")


def _executed(prompts):
    return all(re.fullmatch(r"\[\d+\]:", text) for text in prompts)


def errors(page):
    """What went wrong in any cell."""
    return page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()


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
    """Wait until the view shows other pictures, and is done with it."""
    _wait(lambda: shown(page)[0] != before[0] and shown(page)[2] != "…", 90, f"{what}; it says {shown(page)[2]!r}")
    return shown(page)


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
def opened(lab, browser):
    """Open a view, in a notebook of its own."""
    address, root = lab
    pages, failures = [], []

    def open_view(name):
        cells = [nbformat.v4.new_code_cell(text) for text in (BASE.strip(), VIEWS[name])]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), root / f"{name}.ipynb")
        pages.append(browser.new_page(viewport={"width": WIDTHS[-1], "height": 1300}))
        pages[-1].on("pageerror", lambda error: failures.append(str(error)))
        run_all(pages[-1], address, f"{name}.ipynb", 120)
        assert errors(pages[-1]) == []
        _wait(lambda: len(shown(pages[-1])[0]) > 1, 60, "the view")
        return pages[-1]

    yield open_view
    for page in pages:
        page.close()
    assert failures == []


@pytest.mark.parametrize("name", VIEWS)
def test_every_control_of_a_view_moves_its_pictures_and_numbers(name, opened, pictures):
    page = opened(name)
    labels = page.locator(".apex-view .widget-label").all_inner_texts()
    assert {label for label in labels if label} == {label.removesuffix("*") for label in CONTROLS[name]}
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 1300})
        page.locator(".apex-view").scroll_into_view_if_needed()
        page.wait_for_timeout(1000)
        page.screenshot(path=pictures / f"{name}-{width}.png")
    for label, to in CONTROLS[name].items():
        before = shown(page)
        move(page, label.removesuffix("*"), to)
        after = changed(page, before, label)
        assert after[2] == "", label
        assert label.endswith("*") or after[1] != before[1], label
    page.screenshot(path=pictures / f"{name}-moved.png")


def test_a_pointer_over_the_map_of_units_tells_shows_and_chooses(opened):
    page = opened("units")
    at = stroke(page, 0)
    page.mouse.move(*at(0.3, 0.3))
    _wait(lambda: "rank_score" in shown(page)[2], 10, "words about a unit")
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


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_runs_by_the_menu(notebook, lab, browser):
    page = browser.new_page(viewport={"width": WIDTHS[-1], "height": 1300})
    run_all(page, lab[0], f"notebooks/{notebook}", 300 if notebook.startswith(QUICK) else 3600)
    assert errors(page) == []
    page.close()
