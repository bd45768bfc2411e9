"""A view of masks: the loss, token by token, while chosen heads or channels are silenced."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from ipywidgets import BoundedIntText, Dropdown, FloatSlider, SelectMultiple, Text
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import PercentFormatter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apexlib.analysis.masked_losses import NOTHING, Mask, Masking
from apexlib.explore.panel import BLUE, GREEN, GREY, RED, Point, View, numbers, tokens_html
from apexlib.plot.style import DOTTED

_COLOURS = {"advantageous": RED, "disadvantageous": BLUE, "random": GREY, "by hand": GREEN}  # of orders
_FULL = 2.0  # nats: a change of full colour


class Masks(View):
    """Silence units of a model and see what becomes of a text: its loss beside that of random masks, token by token.

    `text` is a text, or what `pack` or `batches` makes of one; `statistics` rank the units (default: taken on it).
    `table` has every mask measured. A click on a token asks what comes after it; a stroke over the map of units masks
    those under it by hand.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Any, statistics: Any = None
    ) -> None:
        self.state = state = Masking(model, tokenizer, text, statistics)
        last, layers = list(state.parts.items())[-1]
        super().__init__(
            (3.9, 3.0, 3.4),
            component=Dropdown(options=list(state.parts), value=last),
            order=Dropdown(options=list(_COLOURS)),
            share=FloatSlider(0.1, max=1, step=0.01, readout_format=".0%"),
            by_hand=Text(placeholder="0, 2-3"),
            sequence=BoundedIntText(max=len(state.rows) - 1),
            after_token=BoundedIntText(16, max=max(len(ids) for ids, _ in state.rows) - 1),
            layers=SelectMultiple(options=list(layers), value=list(layers), rows=min(6, len(layers))),
        )

    @property
    def mask(self) -> Mask:
        """What the controls silence."""
        component, order, layers = self["component"], self["order"], self["layers"]
        if not layers:
            raise ValueError("layers: none is chosen; need one or more")
        if order != "by hand":
            return self.state.mask(component, order, self["share"], layers)
        chosen = numbers(self["by_hand"], self.state.parts[component][layers[0]].units, component)
        return Mask(component, order, tuple((layer, chosen) for layer in layers))

    def adapt(self) -> None:
        self.controls["by_hand"].disabled = self["order"] != "by hand"
        self.controls["share"].disabled = self["order"] == "by hand"
        self.controls["after_token"].max = len(self.state.rows[self["sequence"]][0]) - 1

    def pointed(self, picture: int, how: str, start: Point, end: Point) -> str | None:
        (left, right), (top, bottom) = (sorted(map(round, pair)) for pair in zip(start, end, strict=True))
        if picture == -1:
            self.move(after_token=left)
        elif picture == 2:
            layers = list(self.state.parts[self["component"]])
            if how != "hover":
                self.move(order="by hand", layers=tuple(layers[top : bottom + 1]), by_hand=f"{left}-{right}")
            else:
                return f"layer {layers[top]}, {self['component']} {left}"
        return None

    def draw(self, curve: Axes, likely: Axes, units: Axes) -> str:
        state, mask, row, place = self.state, self.mask, self["sequence"], self["after_token"]
        base, loss, *others = (state.loss(each) for each in (NOTHING, mask, *state.random_like(mask)))
        _draw_curve(state.table, mask, curve)
        _draw_units(state, mask, units)
        curve.axhline(base, **DOTTED)
        before, after = (state.logits(state.rows[row][0][: place + 1], each)[-1] for each in (NOTHING, mask))
        _draw_next(*(pd.Series(each.softmax(-1).cpu().numpy()) for each in (before, after)), state.tokenizer, likely)
        for ax in (curve, likely):
            ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        around = f"{min(others) - base:+.3f} to {max(others) - base:+.3f}"
        words = f"<b>{loss:.3f} nats per token, {loss - base:+.3f}</b> over the plain model; random masks {around}. "
        old, new = (state.token_losses(each)[row] for each in (NOTHING, mask))
        remarks = [f"{before:.2f} → {after:.2f} nats" for before, after in zip(old, new, strict=True)]
        pieces = map(state.tokenizer.decode, state.rows[row][0][:, None])
        tokens = tokens_html(zip(pieces, np.nan_to_num(new - old), remarks, strict=True), _FULL, place)
        return f"{words}Red: a token's loss rises, blue: it falls; full colour is {_FULL:g} nats.{tokens}"


def _draw_curve(table: pd.DataFrame, mask: Mask, ax: Axes) -> None:
    """Draw what was measured in the mask's layers so far against the share of their units."""
    seen = table.query("component == @mask.component and layers == @mask.layers").sort_values("share")
    drawn = seen[seen["order"] == "random"].groupby("share")["loss"].agg(["min", "max"])
    ax.vlines(drawn.index, drawn["min"], drawn["max"], color=GREY, lw=6, alpha=0.6, label="as many at random")
    for order, own in seen[seen["order"] != "random"].groupby("order"):
        ax.plot(own["share"], own["loss"], "o-", color=_COLOURS[order], label=order)
    now = seen[[units == dict(mask.units) for units in seen["silenced"]]]
    ax.plot(now["share"], now["loss"], "o", ms=10, mfc="none", color="black", label="this mask")
    ax.set(xlim=(-0.02, 1.02), xlabel=f"share of {mask.component}s masked", ylabel="loss (nats per token)")
    ax.xaxis.set_major_formatter(PercentFormatter(1, 0))


def _draw_units(state: Masking, mask: Mask, ax: Axes) -> None:
    """Draw a map of the units, a row per layer, the more active the darker, those masked in the colour of the order."""
    own = state.statistics.query("component == @mask.component")
    ranks = own.groupby("layer")["activation"].rank(pct=True)
    matrix = own.assign(rank=ranks).pivot(index="layer", columns="unit", values="rank")
    shades = mpl.colormaps["Greys"](0.8 * matrix.to_numpy())
    for layer, units in mask.units:
        shades[matrix.index.get_loc(layer), list(units)] = to_rgba(_COLOURS[mask.order])
    ax.imshow(shades, aspect="auto", interpolation="nearest")
    ax.set(xlabel=f"{mask.component} (coloured: masked)", ylabel="layer", yticks=range(len(matrix)))
    ax.set_yticklabels(matrix.index)
    ax.grid(visible=False)


def _draw_next(before: pd.Series, after: pd.Series, tokenizer: object, ax: Axes) -> None:
    """Draw the likeliest next tokens without and with a mask."""
    top = list(dict.fromkeys([*before.nlargest(5).index, *after.nlargest(5).index]))
    for shift, each, colour, label in ((-0.2, before, GREY, "plain"), (0.2, after, RED, "masked")):
        ax.barh(np.arange(len(top)) + shift, each[top], height=0.4, color=colour, label=label)
    names = [ascii(tokenizer.decode([token])).replace("$", r"\$") for token in top]
    ax.set(yticks=range(len(top)), yticklabels=names, xlabel="probability of the next token")
    ax.invert_yaxis()
