"""What every view is made of: controls, and below them pictures and words that follow the controls."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from ipywidgets import HTML, HBox, Layout, Text, ValueWidget, VBox
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from apexlib.plot.style import PALETTE

Point = tuple[float, float]  # x, y
RED, BLUE, GREEN, GREY = PALETTE[3], PALETTE[0], PALETTE[2], "0.6"
_STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False, "axes.grid": True}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.35, "grid.linewidth": 0.5}
_STYLE |= {"lines.linewidth": 1.3, "lines.markersize": 4, "axes.prop_cycle": mpl.cycler(color=PALETTE)}
_DPI = 160
_POINTER = Path(__file__).with_name("pointer.js").read_text(encoding="utf-8")


class View(VBox):
    """Controls by name, pictures side by side or, where there is no room, one below the other, and words.

    A subclass draws. What cannot be shown is said in one line, and the pictures before it stay. Where no front end
    runs, the view is displayed as one picture.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = signature(cls.__init__)  # else that of all widgets would be shown: any arguments
        cls.__signature__ = own.replace(parameters=[*own.parameters.values()][1:])

    def __init__(self, widths: tuple[float, ...] = (4.4, 3.2), height: float = 2.8, **controls: ValueWidget) -> None:
        super().__init__()
        self.controls, self.widths, self.height, self._busy = controls, widths, height, False
        self.said, self.words = HTML(layout=Layout(min_height="1.8em")), HTML()  # has its place, so that nothing jumps
        layouts = [Layout(width=f"{100 * width:.0f}px", max_width="100%") for width in widths]
        self.pictures, self.pointer = [HTML(layout=layout) for layout in layouts], Text(layout=Layout(display="none"))
        flow = {"flex_flow": "row wrap", "align_items": "baseline"}
        rows = [HBox(row, layout=Layout(**flow)) for row in (list(controls.values()), self.pictures)]
        self.children = (rows[0], self.said, rows[1], self.words, self.pointer)
        self.add_class("apex-view")
        self.pointer.add_class("apex-pointer")
        self.pointer.observe(self._point, "value")
        for name, control in controls.items():
            control.description = control.description or name.replace("_", " ")
            control.continuous_update, control.style.description_width = False, "8em"
            control.layout.width = control.layout.width or "262px"  # two beside one another in a narrow window
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

    def pointed(self, picture: int, how: str, start: Point, end: Point) -> str | None:
        """Answer a "hover", a "click" or a "drag" over a picture, in its data's coordinates; words are shown.

        A click on the token of number n comes as one on picture -1, at (n, 0).
        """

    def move(self, **values: Any) -> None:
        """Move several controls and draw once."""
        self._busy = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._busy = False
        self.show()

    def show(self, _: object = None) -> None:
        """Draw again."""
        if self._busy:  # one control has moved another
            return
        self._busy, self.said.value = True, "…"
        try:
            self.adapt()
            with mpl.rc_context(_STYLE):
                figure = Figure((sum(self.widths), self.height), dpi=_DPI, layout="constrained")
                parts = figure.subfigures(1, len(self.widths), width_ratios=self.widths, squeeze=False)[0]
                words = self.draw(*(axes := [part.subplots() for part in parts]))
                (canvas := FigureCanvasAgg(figure)).draw()
            self.axes, self.pixels = axes, np.array(canvas.buffer_rgba())
            answers = type(self).pointed is not View.pointed
            borders = np.rint(_DPI * np.cumsum(self.widths[:-1])).astype(int)
            for number, part in enumerate(np.split(self.pixels, borders, axis=1)):
                self.pictures[number].value = _picture_html(_png(part), number if answers else None)
            self.words.value, self.said.value = f'<div style="line-height: 1.4">{words}</div>', ""
        except (ValueError, OSError) as error:
            self.said.value = _refusal(error)
        finally:
            self._busy = False

    def _point(self, change: Mapping[str, str]) -> None:
        number, how, *shares = change["new"].split()[:6]
        number, corners = int(number), np.reshape([float(share) for share in shares], (2, 2))
        if number >= 0:
            ax, left, size = self.axes[number], sum(self.widths[:number]), (self.widths[number], self.height)
            pixels = _DPI * ((left, size[1]) + corners * (1, -1) * size)
            if not ax.bbox.contains(*pixels[0]):
                return
            pixels = np.clip(pixels, ax.bbox.min + 1, ax.bbox.max - 1)
            corners = ax.transData.inverted().transform(pixels)
        try:
            words = self.pointed(number, how, *map(tuple, corners.tolist()))
        except ValueError as error:
            words = _refusal(error)
        self.said.value = words if words is not None else self.said.value

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        own = {"text/plain": type(self).__name__, "image/png": b64encode(_png(self.pixels)).decode()}
        return (super()._repr_mimebundle_(**options) or {}) | own


def _refusal(error: Exception) -> str:
    return f'<b style="color: {RED}">{escape(str(error))}</b>'


def _png(pixels: UInt8[np.ndarray, "height width 4"]) -> bytes:
    imsave(file := BytesIO(), pixels, format="png")
    return file.getvalue()


def _picture_html(png: bytes, number: int | None) -> str:
    image = f'<img draggable="false" style="width: 100%" src="data:image/png;base64,{b64encode(png).decode()}">'
    if number is None:  # nothing answers a pointer over it
        return image
    mouse = escape(_POINTER.replace("PICTURE", str(number)))
    events = " ".join(f'onpointer{event}="{mouse}"' for event in ("down", "move", "up"))
    return f'<div style="position: relative; cursor: crosshair; touch-action: none" {events}>{image}<i></i></div>'


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
        text, told = escape(token).replace("\n", "↵&#10;"), escape(remark)
        spans.append(f'<span data-token="{place}" style="{style}" title="{told}">{text}</span>')
    style = "white-space: pre-wrap; word-break: normal; line-height: 1.5; margin: 0.6em 0"
    return f'<pre style="{style}" onclick="{escape(_POINTER)}">{"".join(spans)}</pre>'
