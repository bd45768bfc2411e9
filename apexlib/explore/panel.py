"""What every view is made of: controls, and below them a picture and words that follow the controls."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from io import BytesIO
from typing import Any

import matplotlib as mpl
import pandas as pd
from ipywidgets import HTML, HBox, Image, Layout, ValueWidget, VBox
from matplotlib.figure import Figure

RED, BLUE, GREEN, GREY = "#d55e00", "#0173b2", "#029e73", "0.6"  # told apart with any colour vision
ROLES = {  # role of a unit in a plan: its name in a legend, colour; those of the suite's figures
    "source": ("advantageous", RED),
    "target": ("disadvantageous", BLUE),
    "direct": ("directly tuned", GREEN),
    "frozen": ("frozen", "0.85"),
}
DOTTED = {"color": "0.4", "linewidth": 0.9, "linestyle": ":"}  # a level to compare with
_STYLE = {"font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7.5, "legend.frameon": False, "axes.grid": True}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.35, "grid.linewidth": 0.5}
_CYCLE = f"{BLUE} #de8f05 {GREEN} {RED} #cc78bc #ca9161 #fbafe4 #949494 #ece133 #56b4e9"
_STYLE |= {"axes.prop_cycle": mpl.cycler(color=_CYCLE.split())}
_STYLE |= {"lines.linewidth": 1.3, "lines.markersize": 4, "image.aspect": "auto", "image.interpolation": "nearest"}


class View(VBox):
    """Controls by name, a picture and words; a subclass draws them.

    What cannot be shown is said in one line, and the picture before it stays. Where no front end runs, the view is
    displayed as its picture.
    """

    def __init__(self, size: tuple[float, float] = (9.0, 3.2), **controls: ValueWidget) -> None:
        super().__init__()
        self.controls, self.size, self._busy = controls, size, False
        width = f"{100 * size[0]:.0f}px"
        self.said = HTML(layout=Layout(min_height="1.8em"))  # has its place, so that nothing jumps
        self.picture = Image(format="png", layout=Layout(width=width, max_width="100%"))
        self.words = HTML(layout=Layout(max_width=width))
        row = HBox(list(controls.values()), layout=Layout(flex_flow="row wrap", align_items="flex-start"))
        self.children = (row, self.said, self.picture, self.words)
        for name, control in controls.items():
            control.description = control.description or name.replace("_", " ")
            control.continuous_update = False
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

    def draw(self, figure: Figure) -> str:
        """Draw on an empty figure what the controls say, and return words, as HTML."""
        raise NotImplementedError

    def show(self, _: object = None) -> None:
        """Draw again."""
        if self._busy:  # one control has moved another
            return
        self._busy, self.said.value = True, "…"
        try:
            self.adapt()
            with mpl.rc_context(_STYLE), BytesIO() as file:
                words = self.draw(figure := Figure(figsize=self.size, layout="constrained"))
                figure.savefig(file, format="png", dpi=160)
                self.picture.value, self.words.value, self.said.value = file.getvalue(), words, ""
        except (ValueError, OSError) as error:
            self.said.value = f'<b style="color: {RED}">{escape(str(error))}</b>'
        finally:
            self._busy = False

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        own = {"text/plain": type(self).__name__, "image/png": b64encode(self.picture.value).decode()}
        return (super()._repr_mimebundle_(**options) or {}) | own


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
    return f'<pre style="white-space: pre-wrap; line-height: 1.5; font-size: 12px">{"".join(spans)}</pre>'
