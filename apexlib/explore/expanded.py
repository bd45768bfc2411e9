"""A view of an expansion: a matrix, its operator and its change, under any settings and after a few real steps."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from ipywidgets import Dropdown, FloatSlider, Layout, SelectionSlider
from matplotlib.axes import Axes
from torch import Tensor, cat
from transformers import PreTrainedModel

from apexlib.analysis.difference import biography
from apexlib.analysis.first_steps import STEPS, FirstSteps
from apexlib.architectures import Component
from apexlib.explore.panel import View
from apexlib.operators import OPERATORS
from apexlib.plan import ApexConfig, ExpansionPlan
from apexlib.plot.forms import signed
from apexlib.plot.style import ROLES

_SHARES = ("direct_heads", "direct_channels")


class Expansion(View):
    """Choose the settings of an expansion and see what they, and a few steps of AdamW on `batches`, make of a matrix.

    Every step is a real one, see `FirstSteps`, which takes the `options`; what was seen once comes back at once. `plan`
    is what the settings select, `config` the settings, given but for the controls; `table` has what was measured.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, Tensor]],
        statistics: pd.DataFrame | None = None,
        config: ApexConfig | None = None,
        **options: Any,
    ) -> None:
        self.state, self.start = FirstSteps(model, batches, statistics, **options), config or ApexConfig()
        parts, look = self.state.parts, {"step": 0.0125, "readout_format": ".1%"}
        start = next((name for name, part in parts.items() if part.component == "channel"), next(iter(parts)))
        super().__init__(
            (2.7, 2.7, 2.4, 3.2),
            weight=Dropdown(options=list(parts), value=start, layout=Layout(width="32em", max_width="100%")),
            steps=SelectionSlider(options=STEPS, value=4),
            operator=Dropdown(options=list(OPERATORS), value=self.start.operator),
            fraction=FloatSlider(self.start.fraction, min=0.0125, max=0.5, description="fraction (K)", **look),
            **{name: FloatSlider(getattr(self.start, name), min=0, max=1, **look) for name in _SHARES},
        )

    @property
    def config(self) -> ApexConfig:
        """The settings that the controls say."""
        return replace(self.start, **{name: self[name] for name in ("operator", "fraction", *_SHARES)})

    @property
    def plan(self) -> ExpansionPlan:
        """What these settings select."""
        return self.state.plan(self.config)

    def adapt(self) -> None:
        for name in _SHARES:  # source and target are part of what trains
            self.controls[name].min = 2 * self["fraction"]

    def draw(self, whole: Axes, change: Axes, operator: Axes, spectrum: Axes) -> str:
        weight, plan = self["weight"], self.plan
        part, (found, sigma, row) = self.state.parts[weight], self.state.measured(self.config, self["steps"], weight)
        axis = next(slot.axis for slot in part.slots.values() if slot.module == weight)
        rows = _by_role(part, weight, plan)
        for ax, name in ((whole, "W"), (change, "ΔW")):
            signed(found[name].movedim(axis, 0)[cat(list(rows.values()))].float().cpu().numpy(), ax)
            ax.set(title=f"{name}, norm {row[f'{name}_frobenius']:.3g}", xticks=[])
            _draw_roles(rows, ax)
        operator.set(title="no M: no pair of units", xticks=[], yticks=[])
        if "M" in found:
            signed(found["M"].float().cpu().numpy(), operator)
            operator.set(title=f"M, {self['operator']}, norm {row['M_frobenius']:.3g}")
            operator.set(xlabel=f"advantageous {part.component}s", ylabel=f"disadvantageous {part.component}s")
        for name, values in sigma.items():
            label = f"{name}, effective rank {row[f'{name}_effective_rank']:.4g}"
            spectrum.semilogy(np.arange(1, len(values) + 1), values, label=label)
        largest = max(values[0] for values in sigma.values())
        spectrum.set(title="singular values", xlabel="in order", ylim=(1e-6 * largest, 1e3 * largest))
        spectrum.legend(loc="upper right")
        return self._words(row)

    def _words(self, row: Mapping[str, Any]) -> str:
        """Say what trains, what it did so far, and what a run of it needs beside full fine-tuning."""
        full, many = self.state.budget("full"), row["steps"] != 1
        words = f"<b>{row['share']:.1%} of the parameters train</b> ({row['trainable']:,}, operators included). "
        words += f"Loss on the first batch {self.state.loss:.3f} → {row['loss']:.3f} nats per token after "
        words += f"{row['steps']} step{'s' * many}. Predicted: {row['train_mib']:.0f} MiB and "
        words += f"{row['seconds_per_step']:.2g} s a step; full fine-tuning"
        return f"{words} {full['train_mib']:.0f} MiB and {full['seconds_per_step']:.2g} s."


def _draw_roles(rows: Mapping[str, Tensor], ax: Axes) -> None:
    """Name the roles of rows, that lie one below the other, and separate them."""
    sizes = np.array([len(own) for own in rows.values()])
    ends = np.cumsum(sizes)
    ax.set_yticks(ends - sizes / 2, list(rows))
    for label in ax.get_yticklabels():
        label.set_color(ROLES[role][1] if (role := label.get_text()) != "frozen" else "0.4")
    ax.hlines(ends[:-1] - 0.5, *ax.get_xlim(), color="black", lw=0.8)


def _by_role(part: Component, weight: str, plan: ExpansionPlan) -> dict[str, Tensor]:
    """List the rows of each role's units, along the axis of the slots."""
    roles = biography([plan]).query("layer == @part.layer and component == @part.component").set_index("unit")["role"]
    roles = roles.reindex(range(part.units), fill_value="frozen")  # where nothing of a layer is planned
    slots = [slot for slot in part.slots.values() if slot.module == weight]
    units = {role: np.flatnonzero(roles == role) for role in ROLES}
    return {role: cat([slot.index[own].flatten() for slot in slots]) for role, own in units.items() if len(own)}
