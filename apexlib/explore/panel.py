"""What every view is made of: controls, and below them pictures and words that follow the controls."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from ipywidgets import HTML, HBox, Image, Layout, ValueWidget, VBox
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from apexlib.plot.style import PALETTE

RED, BLUE, GREEN, GREY = PALETTE[3], PALETTE[0], PALETTE[2], "0.6"
_STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False, "axes.grid": True}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.35, "grid.linewidth": 0.5}
_STYLE |= {"lines.linewidth": 1.3, "lines.markersize": 4, "axes.prop_cycle": mpl.cycler(color=PALETTE)}


class View(VBox):
    """Controls by name, pictures side by side or, where there is no room, one below the other, and words.

    A subclass draws. What cannot be shown is said in one line, and the pictures before it stay. Where no front end
    runs, the view is displayed as one picture.
    """

    def __init__(self, widths: tuple[float, ...] = (4.4, 3.2), height: float = 2.8, **controls: ValueWidget) -> None:
        super().__init__()
        self.controls, self.widths, self.height, self._busy = controls, widths, height, False
        self.said, self.words = HTML(layout=Layout(min_height="1.8em")), HTML()  # has its place, so that nothing jumps
        layouts = [Layout(width=f"{100 * width:.0f}px", max_width="100%") for width in widths]
        self.pictures = [Image(format="png", layout=layout) for layout in layouts]
        rows = [HBox(row, layout=Layout(flex_flow="row wrap")) for row in (list(controls.values()), self.pictures)]
        self.children = (rows[0], self.said, rows[1], self.words)
        for name, control in controls.items():
            control.description = control.description or name.replace("_", " ")
            control.continuous_update, control.style.description_width = False, "8em"
            control.observe(self.show, "value")
        self.show()

    def __getitem__(self, name: str) -> Any:
        """Return what a control says."""
        return self.controls[name].value

    @property
    def table(self) -> pd.DataFrame:
        """What was measured so far."""
        return self.state.table

    def adapt(self) -> None:
        """Fit controls to one another, before they are read."""

    def draw(self, *axes: Axes) -> str:
        """Draw on empty axes, one for each width, what the controls say, and return words, as HTML."""
        raise NotImplementedError

    def show(self, _: object = None) -> None:
        """Draw again."""
        if self._busy:  # one control has moved another
            return
        self._busy, self.said.value = True, "…"
        try:
            self.adapt()
            with mpl.rc_context(_STYLE):
                figure = Figure((sum(self.widths), self.height), dpi=160, layout="constrained")
                parts = figure.subfigures(1, len(self.widths), width_ratios=self.widths, squeeze=False)[0]
                words = self.draw(*(part.subplots() for part in parts))
                (canvas := FigureCanvasAgg(figure)).draw()
            self.pixels = np.array(canvas.buffer_rgba())
            borders = np.rint(160 * np.cumsum(self.widths[:-1])).astype(int)
            for picture, part in zip(self.pictures, np.split(self.pixels, borders, axis=1), strict=True):
                picture.value = _png(part)
            self.words.value, self.said.value = f'<div style="line-height: 1.4">{words}</div>', ""
        except (ValueError, OSError) as error:
            self.said.value = f'<b style="color: {RED}">{escape(str(error))}</b>'
        finally:
            self._busy = False

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        own = {"text/plain": type(self).__name__, "image/png": b64encode(_png(self.pixels)).decode()}
        return (super()._repr_mimebundle_(**options) or {}) | own


def _png(pixels: UInt8[np.ndarray, "height width 4"]) -> bytes:
    imsave(file := BytesIO(), pixels, format="png")
    return file.getvalue()


def numbers(text: str, below: int, what: str) -> tuple[int, ...]:
    """Read numbers and ranges.

    >>> numbers("4-6, 0", 8, "head")
    (0, 4, 5, 6)
    """
    found: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) < below):
            raise ValueError(f"{what} {part!r}: need numbers or ranges from 0 to {below - 1}, such as 0, 2-3")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def tokens_html(tokens: Iterable[tuple[str, float, str]], most: float, mark: int = -1) -> str:
    """Write tokens on red for values above 0 and blue for those below, full at ±`most`, each with a remark."""
    spans = []
    for place, (token, value, remark) in enumerate(tokens):
        ground = f"{'213, 94, 0' if value > 0 else '1, 115, 178'}, {0.75 * min(1.0, abs(value) / most):.2f}"
        style = f"background: rgba({ground})" + "; outline: 2px solid" * (place == mark)
        spans.append(
            f'<span style="{style}" title="{escape(remark)}">{escape(token).replace(chr(10), "↵&#10;")}</span>'
        )
    style = "white-space: pre-wrap; word-break: normal; line-height: 1.5; margin: 0.6em 0"
    return f'<pre style="{style}">{"".join(spans)}</pre>'
