"""A view of spectra: any matrix of a model and of others, and what these added to it."""

from collections.abc import Mapping

import numpy as np
from ipywidgets import Dropdown, Layout, SelectMultiple
from matplotlib.axes import Axes

from apexlib.analysis.spectra import Spectra
from apexlib.analysis.spectrum import Model, layer_and_role
from apexlib.explore.panel import View


class Spectrum(View):
    """Compare the singular values of a base, a model or a folder, with those of `others`, by name: `table`."""

    def __init__(self, base: Model, others: Mapping[str, Model] | None = None) -> None:
        self.state = state = Spectra(base, others)
        others = [name for name in state.models if name != "base"]
        start = next((weight for weight in state.weights if layer_and_role(weight)[0] >= 0), state.weights[0])
        super().__init__(
            (3.8, 3.8),
            weight=Dropdown(options=state.weights, value=start, layout=Layout(width="32em", max_width="100%")),
            models=SelectMultiple(options=others, value=others[:4], rows=min(5, max(2, len(others)))),
        )

    def draw(self, *axes: Axes) -> str:
        weight, state, models = self["weight"], self.state, self["models"]
        asked = {"W": [("base", False), *((name, False) for name in models)], "ΔW": [(name, True) for name in models]}
        for ax, (title, spectra) in zip(axes, asked.items(), strict=True):
            for number, (name, update) in enumerate(spectra, title == "ΔW"):  # a model has one colour in both
                sigma, edge = state.sigma(weight, name, update)
                ax.semilogy(np.arange(1, len(sigma) + 1), sigma, color=f"C{number}", label=name)
                ax.axhline(edge, color=f"C{number}", lw=0.8, linestyle=":")
            ax.set(title=f"{title}, {weight}", xlabel="in order (dotted: edge of a random matrix)")
            if spectra:
                ax.set(ylabel="singular value", ylim=(max(ax.dataLim.y0 / 2, 1e-4 * ax.dataLim.y1, 1e-12), None))
                ax.legend()
        table = self.table.query("weight == @weight and (model == 'base' or model in @models)")
        columns = ["model", "matrix", "effective_rank", "random", "stable_rank", "frobenius", "above_edge"]
        html = table[columns].to_html(index=False, border=0, justify="left", float_format="{:.4g}".format)
        return html.replace("<table", '<table cellpadding="5"')
