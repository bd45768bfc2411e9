"""For readers without Python: the ledger of claims, runs and figures, as a page to look through and a PDF; no torch."""

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import yaml
from jinja2 import StrictUndefined, Template
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure as Page

from apexlib.analysis.records import Records
from apexlib.files import atomic_write, read_object
from apexlib.suite.figures import DPI, FIGURES, told
from apexlib.suite.ledger import measured, read_claims

_BESIDE = Path(__file__).parent
WORDS = yaml.safe_load((_BESIDE / "overview.yaml").read_text(encoding="utf-8"))
VERDICTS = WORDS["colours"]
A4 = (8.27, 11.69)  # inches
_MARGIN = 0.63  # inches; leaves the width of a figure of two columns
Part = tuple[float, Callable[[Page, float], None]]  # of a page: its height in inches, and what draws it below a `top`


def write_overview(claims: pd.DataFrame, results: Path, figures: Path) -> list[Path]:
    """Write `overview.html` and `overview.pdf` to `figures`, from a `claims_table` and what lies in the two folders.

    The HTML holds all it shows (figures as SVG) and asks for nothing elsewhere; it links notebooks where they lie
    beside `figures`. Equal inputs give equal bytes.
    """
    figures, facts = Path(figures), run_facts(results)
    paths = [figures / "overview.html", figures / "overview.pdf"]
    with atomic_write(paths[0]) as file:
        file.write_text(overview_html(claims, results, figures), encoding="utf-8")
    look, nothing = {"pdf.fonttype": 42, "font.size": 8}, dict.fromkeys(("Creator", "Producer", "CreationDate"))
    with atomic_write(paths[1]) as file, mpl.rc_context(look), PdfPages(file, metadata=nothing) as pdf:
        for page in [*ledger_pages(claims, facts), *figure_pages(figures)]:
            pdf.savefig(page)
    return paths


def run_facts(results: Path) -> str:
    """Say where and with what the tables of a folder were made, from the provenance beside them."""
    made = [read_object(path) for path in Path(results).glob("*.json") if path.with_suffix(".csv").is_file()]
    devices = {facts["device"] for facts in made}
    versions = {f"Python {facts['python']}" for facts in made}
    versions |= {f"{name} {facts['versions'][name]}" for facts in made for name in ("torch", "transformers")}
    where = "; ".join(sorted(devices - {"cpu"} or devices))  # "cpu" alone: a notebook that computed without torch
    return f"Profile {Path(results).name}. Made on {where}, with {', '.join(sorted(versions))}."


def overview_html(claims: pd.DataFrame, results: Path, figures: Path) -> str:
    """Write the page: the bottom line, the ledger to look through, trainings by method and rate, the figures."""
    drawn, rows = _drawn(figures), {row.number: row for row in claims.itertuples()}
    questions = {name: [rows[n] for n in numbers if n in rows] for name, numbers in WORDS["questions"].items()}
    said = WORDS | {"claims": rows, "counts": _counts(claims), "facts": run_facts(results), "heading": _heading}
    said |= {"questions": questions, "measured": measured, "drawn": drawn, "rates": dict(_rates(claims, results))}
    said["values"] = {claim.number: claim.values(results).tolist() for claim in read_claims()}
    said["shows"] = {name: [n for n in FIGURES[name].get("claims", ()) if n in rows] for name, _ in drawn}
    said["svg"] = lambda name: inline_svg((figures / f"{name}.svg").read_text(encoding="utf-8"), name)
    page = (_BESIDE / "overview.html").read_text(encoding="utf-8")
    return Template(page, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined).render(said)


def _rates(claims: pd.DataFrame, results: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """Tell of each measure of instruction tuning a row per method, a column per rate: mean and range over seeds."""
    if (path := Path(results) / "instruction.csv").is_file():
        records = Records({"claims": claims, "instruction": pd.read_csv(path)})
        for measure in records.measures:
            means = records.chart(measure, records.runs["method"].unique())
            said = means.agg(lambda row: f"{row['mean']:.4g} [{row['min']:.4g}, {row['max']:.4g}]", axis=1)
            table = means.assign(said=said).pivot(index="method", columns="learning_rate", values="said")
            yield measure, table.fillna("")


def inline_svg(text: str, name: str) -> str:
    """Make an SVG file part of a page: no prologue or metadata, as wide as there is room, ids of its own."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    width = re.search(r'width="([\d.]+)pt"', text)[1]
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{name}" style="max-width: {width}pt" ', 1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text).strip()


def ledger_pages(claims: pd.DataFrame, facts: str) -> list[Page]:
    """Set the ledger on A4 pages, a block for each claim, its verdict at the right."""
    opening = (_text(text, gap=0.06) for text in (_counts(claims), WORDS["introduction"], facts))
    blocks = [[_text(WORDS["title"], size=14, weight="bold"), *opening]]
    for notebook, rows in claims.groupby("notebook", sort=False):
        heading = [_text(_heading(notebook), size=11, weight="bold", gap=0.14)]
        for row in rows.itertuples():
            seeds = f" ({row.n} seeds)" if row.n > 1 else ""
            verdict = _text(row.verdict, weight="bold", color=VERDICTS[row.verdict], right=True, gap=0.1)
            statement = _text(f"{row.number}  {row.statement}", wide=1.5, weight="bold", gap=0.1)
            here = _text(f"The paper: {row.expected}.   Here: {measured(row)}{seeds}.")
            notes = (f"Rule: {row.rule}.", f"Limits: {row.limits}", f"Source: {row.source}.")
            small = (_text(note, size=7, color="0.3") for note in notes)
            blocks.append([*heading, verdict, statement, here, *small])
            heading = []  # stands above the first
    return _pages(blocks)


def figure_pages(figures: Path) -> list[Page]:
    """Set the figures, as they lie in the folder, on A4 pages with their captions."""
    parts = ((_picture(figures / f"{name}.png"), _text(caption)) for name, caption in _drawn(figures))
    return _pages([*both, _text("", gap=0.2)] for both in parts)


def _pages(blocks: Iterable[list[Part]]) -> list[Page]:
    """Set blocks below one another on A4 pages, none of them split."""
    pages, top = [], 0.0
    for block in blocks:
        if top - sum(height for height, _ in block) < _MARGIN:
            pages.append(Page(figsize=A4, layout="none"))
            top = A4[1] - _MARGIN
        for height, draw in block:
            draw(pages[-1], top)
            top -= height
    return pages


def _text(text: str, *, size: float = 8, wide: float = 1, right: bool = False, gap: float = 0, **look: str) -> Part:
    """Set text, letters so many times as `wide` as usual, `gap` inches lower; `right`: beside what follows."""
    lines = textwrap.wrap(text, int(930 / (size * wide)), break_on_hyphens=False)
    x, side = (A4[0] - _MARGIN, "right") if right else (_MARGIN, "left")

    def draw(page: Page, top: float) -> None:
        for row, line in enumerate(lines):
            y = top - gap - row * size * 1.35 / 72
            page.text(x / A4[0], y / A4[1], line, size=size, va="top", ha=side, **look)

    return 0 if right else gap + len(lines) * size * 1.35 / 72, draw


def _picture(path: Path) -> Part:
    pixels = plt.imread(path)
    height, width = (size / DPI for size in pixels.shape[:2])  # inches

    def draw(page: Page, top: float) -> None:
        box = (_MARGIN / A4[0], (top - height) / A4[1], width / A4[0], height / A4[1])
        page.add_axes(box, frameon=False, xticks=[], yticks=[]).imshow(pixels, aspect="auto", interpolation="none")

    return height, draw


def _drawn(figures: Path) -> list[tuple[str, str]]:
    return [(name, " ".join(told(name, figures))) for name in FIGURES if (figures / f"{name}.svg").is_file()]


def _counts(claims: pd.DataFrame) -> str:
    counts = claims["verdict"].value_counts()
    return f"{len(claims)} claims: {', '.join(f'{counts[name]} {name}' for name in VERDICTS if name in counts)}."


def _heading(notebook: str) -> str:
    return f"{notebook[3:].replace('_', ' ').capitalize()} (notebook {notebook[:2]})"
