"""The overview: everything that was claimed and drawn, on pages that need nothing else, the same bytes each time."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from apexlib.suite.figures import FIGURES, draw_figure
from apexlib.suite.ledger import claims_table, read_claims
from apexlib.suite.overview import (
    VERDICTS,
    figure_pages,
    inline_svg,
    ledger_pages,
    overview_html,
    run_facts,
    write_overview,
)

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """What a page says, asks for and names; raises where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.ids, self.asked, self.open = "", [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open += [tag] * (tag not in VOID)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.asked += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        self.asked += re.findall(r"url\(([^)]*)\)", " ".join(value for _, value in attributes if value))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    rows = [(order, x, x, 0, 2, p) for p in "ab" for order in ("advantageous", "random") for x in (0, 0.5)]
    curve = pd.DataFrame(rows, columns=["order", "share", "mean", "low", "high", "panel"])
    draw_figure(curve, "masking_curve", folder)
    units = pd.DataFrame({"layer": 0, "component": "head", "unit": range(9), "activation": range(9)})
    draw_figure(units, "activation_distribution", folder)
    plt.close("all")
    return folder


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """Every claim of the ledger, as many as may be with each verdict, and text that HTML gives a meaning to."""
    table = claims_table(tmp_path_factory.mktemp("empty"))
    verdicts = [list(VERDICTS)[row % 4] for row in range(len(table))]
    table = table.assign(verdict=verdicts, n=3, mean=-0.125, low=-0.25, high=0.0)
    table.loc[0, "limits"] = "a < b & c > d"
    return table


def test_equal_inputs_give_equal_bytes_in_any_process(figures, ledger, tmp_path):
    ledger.to_pickle(tmp_path / "ledger.pkl")
    code = """
import sys
from pathlib import Path
import pandas as pd
from apexlib.suite.overview import write_overview
write_overview(pd.read_pickle(sys.argv[1]), *map(Path, sys.argv[2:]))
print("torch" in sys.modules)
"""
    command, written = [sys.executable, "-c", code, str(tmp_path / "ledger.pkl"), str(tmp_path), str(figures)], []
    for seed in "12":  # Python's own hashes differ between the two
        environment = os.environ | {"PYTHONHASHSEED": seed, "MPLBACKEND": "Agg"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout == "False\n", done.stderr
        written.append([(figures / f"overview.{ending}").read_bytes() for ending in ("html", "pdf")])
    assert written[0] == written[1]
    assert written[0][1].startswith(b"%PDF")
    assert b"/CreationDate" not in written[0][1]


@pytest.fixture
def results(tmp_path):
    """A folder of a few trainings, at two rates, and of what decides a claim of them."""
    runs = [("apex", rate, seed, 1 + seed + rate) for rate in (0.1, 0.2) for seed in range(3)]
    table = pd.DataFrame([*runs, ("full", 0.1, 0, 4.0)], columns=["method", "learning_rate", "seed", "valid_loss"])
    table["exact_match"], table["chosen"] = table["valid_loss"] / 2, table["learning_rate"] == 0.1
    others = ("answer_loss", "retention_loss", "erank_change", "update_norm", "by_operator", "seconds_per_step")
    table.assign(**dict.fromkeys((*others, "trainable"), table["valid_loss"])).to_csv(
        tmp_path / "instruction.csv", index=False
    )
    return tmp_path


def test_the_page_is_whole_holds_every_claim_and_asks_for_nothing(figures, ledger, results):
    page = Page(overview_html(ledger, results, figures))
    said = " ".join(page.text.split())
    for row in ledger.itertuples():
        for text in (row.statement, row.expected, row.rule, row.limits, row.source, row.verdict):
            assert " ".join(text.split()) in said
    assert f"{len(ledger)} claims: {(ledger['verdict'] == 'reproduced').sum()} reproduced" in said
    assert run_facts(results) in said
    assert "silenced in every layer" in said
    assert "has 22% of the activation of heads" in said  # 8 of 36
    assert "Loss of the base models" not in said  # no such figure lies there
    assert len(page.ids) == len(set(page.ids))
    assert page.asked
    notebooks = {f"../../notebooks/{name}.ipynb" for name in ledger["notebook"]}
    assert all(link in notebooks or link.startswith(("#", "data:")) for link in page.asked)
    assert notebooks <= set(page.asked)
    assert {link[1:] for link in page.asked if link.startswith("#")} <= set(page.ids)


def test_the_page_tells_trainings_by_method_and_rate_and_seeds_of_a_claim(figures, ledger, results):
    said = " ".join(re.sub(r"<[^>]+>", " ", overview_html(ledger, results, figures)).split())
    assert "valid_loss 0.1 0.2 apex 2.1 [1.1, 3.1] 2.2 [1.2, 3.2] full 4 [4, 4]" in said
    assert "exact_match 0.1 0.2 apex 1.05 [0.55, 1.55]" in said
    values = {claim.number: claim.values(results) for claim in read_claims()}
    seeds = ", ".join(f"{value:+.4g}" for value in values[9])
    assert len(values[9]) == 1  # the seed that both methods have
    assert f"3 seeds {seeds} limits" in said


def test_claims_and_figures_lead_to_one_another(figures, ledger, results):
    asked = Page(overview_html(ledger, results, figures)).asked
    assert asked.count("#figure-masking_curve") == 4
    assert asked.count("#claim-3") == 1  # from the figure; 1 and 2 are in the bottom line too
    assert asked.count("#claim-1") == 2
    shown = [number for figure in FIGURES.values() for number in figure.get("claims", ())]
    assert set(shown) <= {claim.number for claim in read_claims()}
    assert len(shown) == len(set(shown))


def test_an_svg_keeps_its_picture_and_gets_names_of_its_own():
    text = '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="72pt" height="36pt" viewBox="0 0 72 36">'
    text += "<metadata>when\n</metadata>"
    text += '<defs><path id="p"/></defs><use xlink:href="#p" clip-path="url(#p)"/></svg>\n'
    assert inline_svg(text, "f") == (
        '<svg role="img" aria-label="f" style="max-width: 72pt" viewBox="0 0 72 36">'
        '<defs><path id="f-p"/></defs><use xlink:href="#f-p" clip-path="url(#f-p)"/></svg>'
    )


def test_no_text_leaves_a_page_or_meets_another(figures, ledger):
    pages = [*ledger_pages(ledger, "Made on cpu."), *figure_pages(figures)]
    assert len(pages) > 3
    for page in pages:
        canvas = FigureCanvasAgg(page)
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in page.texts]
        boxes += [ax.get_window_extent(canvas.get_renderer()) for ax in page.axes]
        width, height = page.bbox.size
        for box in boxes:
            assert 0.05 * width < box.x0 < box.x1 < 0.95 * width
            assert 0.03 * height < box.y0 < box.y1 < height
        for number, box in enumerate(boxes):
            assert not any(box.shrunk(0.98, 0.75).overlaps(other.shrunk(0.98, 0.75)) for other in boxes[:number])
    said = " ".join(text.get_text() for page in pages for text in page.texts)
    assert all(" ".join(rule.split()) in " ".join(said.split()) for rule in ledger["rule"])


def test_facts_of_the_run_come_from_the_tables_provenance(tmp_path):
    for name, device in (("a", "cpu"), ("b", "some GPU")):
        (tmp_path / f"{name}.csv").write_text("x\n1\n")
        (tmp_path / f"{name}.json").write_text(
            f'{{"device": "{device}", "python": "3.11", "versions": {{"torch": "2", "transformers": "5"}}}}'
        )
    (tmp_path / "c.csv").write_text("x\n1\n")  # made by hand
    assert (
        run_facts(tmp_path) == f"Profile {tmp_path.name}. Made on some GPU, with Python 3.11, torch 2, transformers 5."
    )


def test_a_folder_without_figures_gets_its_ledger(ledger, tmp_path):
    for path in write_overview(ledger, tmp_path, tmp_path):
        assert path.stat().st_size > 10_000
