"""Figures: what is drawn is what the table says, means or what was measured; equal tables give equal bytes."""

import re
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Text

from apexlib import plot
from apexlib.analysis.intervals import summarise
from apexlib.plot import forms
from apexlib.plot.style import ROLES, STYLE
from apexlib.suite import figures as plotting
from apexlib.suite.sentences import sentence
from benchmarks.figures import plot_forecast, plot_scaling, plot_step_costs

RECORDED = Path(__file__).parents[1] / "figures" / "study"


@pytest.fixture(autouse=True)
def as_it_was():
    with mpl.rc_context():
        yield
    plt.close("all")


@pytest.fixture
def styled():
    with plt.style.context(STYLE):
        yield


def masking():
    rows = [
        {"order": order, "share": fraction, "mean": slope * fraction, "low": -0.1, "high": 2.0}
        for order, slope in (("advantageous", 3.0), ("random", 1.0), ("disadvantageous", 0.1))
        for fraction in (0.0, 0.5, 1.0)
    ]
    return pd.DataFrame(rows)


def paired():
    return pd.DataFrame({"component": "head", "share": [0.0, 0.5, 1.0], "mean": [0, 1, 2], "low": -0.1, "high": 2.5})


def imbalance():
    return pd.DataFrame({"model": "base", "tokens": [0, 4e6, 8e6], "mean": [0.2, 1.0, 2.0], "low": 0.1, "high": 2.5})


def curve():
    train = pd.DataFrame({"model": "base", "seed": [0, 1] * 3, "split": "train", "tokens": [1, 1, 2, 2, 3, 3]})
    valid = pd.DataFrame({"model": "base", "seed": 0, "split": "valid", "tokens": [0, 3]})
    table = pd.concat([train, valid], ignore_index=True)
    return table.assign(tokens=table["tokens"] * 1e6, loss=np.linspace(5, 3, len(table)))


def activations():
    return pd.DataFrame({"layer": np.repeat([0, 1], 50), "unit": list(range(50)) * 2, "activation": np.arange(100.0)})


def weight():
    roles = ["source", "target", "direct", "frozen"]
    rows = [(unit, column, unit - column, roles[unit % 4]) for unit in range(8) for column in range(5)]
    return pd.DataFrame(rows, columns=["unit", "column", "value", "role"])


def comparison():
    return pd.DataFrame({"method": ["apex", "full"], "mean": [1.0, 2.0], "low": [0.5, 1.5], "high": [1.5, 2.5]})


def token_curve():
    return pd.DataFrame({"method": "apex", "tokens": [1e6, 2e6], "mean": [3.0, 2.0], "low": 1.5, "high": 3.5})


def rates():
    columns = {"method": ["apex", "full"] * 2, "learning_rate": [1e-3, 1e-3, 3e-3, 3e-3]}
    return pd.DataFrame(columns | {"loss": [1.0, 2.0, 1.5, 1.0], "chosen": [True, False, False, True]})


def trade_off():
    return rates().rename(columns={"loss": "valid_loss"}).assign(retention_loss=[3.0, 4.0, 5.0, 6.0])


def constructed():
    rows = {"case": ["flat", "flat", "spread", "spread"], "strength": [0.0, 1.0] * 2, "mean": [0, 0.1, 0, -0.1]}
    return pd.DataFrame(rows).assign(low=-0.2, high=0.2, by_chance=0.05)


def by_method():
    return pd.DataFrame({"method": ["full", "apex"], "mean": [0.1, 0.2], "low": 0.0, "high": 0.3, "null": 0.15})


def by_layer():
    roles = ["gate_proj", "gate_proj", "v_proj", "v_proj"]
    return pd.DataFrame({"layer": [0, 1] * 2, "role": roles, "share": [0.9, 0.8, 0.7, 0.6]})


def gains():
    columns = {"seed": [0, 1] * 2, "erank_change": [0.1, 0.2, 0.3, 0.4], "answer_loss_gain": [1.0, 1.1, 1.2, 1.3]}
    return pd.DataFrame({"method": ["full", "full", "apex", "apex"]} | columns)


def by_role():
    roles = ["source", "target", "direct", "frozen"]
    return pd.DataFrame({"method": ["full"] * 4 + ["apex"] * 4, "role": roles * 2, "relative": np.arange(8) / 10})


def lives():
    first, second = (
        ["target", "source", "direct", "frozen", "frozen"],
        ["direct", "source", "target", "frozen", "direct"],
    )
    units = pd.DataFrame({"layer": 0, "component": "channel", "unit": list(range(5)) * 2, "stage": [0] * 5 + [1] * 5})
    return units.assign(role=first + second)


def step_costs():
    columns = {"ratio": [1.0, 0.75], "ratio_low": [0.5, 0.5], "ratio_high": [1.5, 1.0], "peak_ratio": [1.0, 0.5]}
    return pd.DataFrame({"method": ["full", "apex"]} | columns)


def scaling():
    return pd.DataFrame({"axis": "k", "value": [0.5, 0.25], "method": "apex", "seconds": [2.0, 1.0]})


def forecast():
    return pd.DataFrame({"phase": ["train", "fuse"], "forecast_mib": [90, 200], "measured_mib": [100, 190]})


def step_changes():
    settings = [("small", 0.5, [0.25, -0.5]), ("large", 0.25, [0.5, 1.0])]
    tables = [
        pd.DataFrame({"setting": setting, "method": ["operators", "all"], "mean": means}).assign(
            low=lambda table, half=half: table["mean"] - half, high=lambda table, half=half: table["mean"] + half
        )
        for setting, half, means in settings
    ]
    return pd.concat(tables, ignore_index=True)


def by_share():
    means = {"mean": [0.5, -0.25, 0.0], "low": [0.25, -0.5, -0.125], "high": [0.75, 0.0, 0.125]}
    return pd.DataFrame({"method": ["direct", "lora", "direct"], "trainable": [0.03125, 0.03125, 0.5]} | means)


PANELS = {  # a table for each panel of a figure
    ("loss_curve", 0): curve,
    ("activation_distribution", 0): activations,
    ("masking_curve", 0): masking,
    ("masking_curve", 1): masking,
    ("masking_curve", 2): paired,
    ("imbalance", 0): imbalance,
    ("expansion", 0): weight,
    ("expansion", 1): weight,
    ("expansion", 2): weight,
    ("learning_rates", 0): rates,
    ("instruction", 0): comparison,
    ("by_share", 0): by_share,
    ("by_share", 1): by_share,
    ("trade_off", 0): trade_off,
    ("continued_rates", 0): rates,
    ("continued", 0): token_curve,
    ("continued", 1): token_curve,
    ("continued_lengths", 0): token_curve,
    ("continued_lengths", 1): token_curve,
    ("constructed_ranks", 0): constructed,
    ("effective_rank", 0): by_layer,
    ("effective_rank", 1): by_method,
    ("update_rank", 0): by_method,
    ("rank_gain", 0): gains,
    ("movement_by_role", 0): by_role,
    ("movement_by_role", 1): lives,
    ("ablations", 0): comparison,
    ("decomposition", 0): step_changes,
}
PLOTS = {
    f"{name}-{panel}": (partial(plotting.plot, name=name, panel=panel), make)
    for (name, panel), make in PANELS.items()
    if make not in (comparison, step_changes)  # their labels are the panels' titles
}
PLOTS |= {"scaling": (plot_scaling, scaling), "forecast": (plot_forecast, forecast)}


@pytest.mark.parametrize(("plot", "make"), PLOTS.values(), ids=PLOTS)
def test_figures_have_labels_legend_their_data_and_the_same_bytes_twice(plot, make, tmp_path):
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        (ax,) = plotting.new_figure()
        assert plot(make(), ax) is ax
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        legends = [ax.get_legend(), *ax.figure.legends]
        assert [text for legend in filter(None, legends) for text in legend.get_texts()] or ax.texts  # beside lines
        written.append(plotting.save_figure(ax, "figure", folder=folder))
    assert [path.suffix for path in written[0]] == [".svg", ".png", ".csv"]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(written[0][2]), make(), check_dtype=False)


def test_lines_are_drawn_at_the_tables_values():
    (ax,) = plotting.new_figure()
    plotting.plot(masking(), ax, "masking_curve")
    lines = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
    assert lines["most active first"].tolist() == [[0, 0], [0.5, 1.5], [1, 3]]


def test_a_method_of_few_weights_has_the_colour_of_the_whole_one_and_no_two_look_alike():
    whole = ["apex", "full", "hft", "gmt", "lora", "direct", "random"]  # as many as could make markers come again
    names = [*[name + share for share in ("", "-2.4%") for name in whole][:12], "direct-rows-75%"]
    looks = {name: look for name, _, look in forms.groups(pd.DataFrame({"method": names}), "method")}
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(names)
    assert looks["lora-2.4%"]["color"] == looks["lora"]["color"] != looks["gmt"]["color"]
    assert [looks[n]["linestyle"] for n in ("lora", "lora-2.4%", "direct-rows-75%")] == ["-", "--", "-"]
    many = pd.read_csv(RECORDED / "rank_gain.csv")[["method"]].drop_duplicates()  # more than there are markers
    drawn = [(look["color"], look["marker"]) for _, _, look in forms.groups(many, "method")]
    assert len(set(drawn)) == len(many) > 20


def test_lines_on_one_another_can_be_told_apart():
    table = pd.DataFrame({"method": ["a", "b"] * 2, "x": [0, 0, 60, 60], "mean": 1.0, "low": 0.5, "high": 1.5})
    beside, thinner = plotting.new_figure(2)
    forms.lines(table, beside, by="method", x="x", overlap="dodge")
    assert [line.get_xdata().tolist() for line in beside.get_lines()] == [[0, 60], [1, 61]]
    bars = [bar for each in beside.collections for bar in each.get_segments()]
    assert [bar.tolist() for bar in bars[-2:]] == [[[1, 0.5], [1, 1.5]], [[61, 0.5], [61, 1.5]]]
    forms.lines(table, thinner, by="method", x="x", overlap="nest", intervals=False)
    first, second = thinner.get_lines()
    assert first.get_linewidth() > second.get_linewidth()
    assert not thinner.collections


def test_the_interval_of_a_single_point_is_a_bar():
    (ax,) = plotting.new_figure()
    table = pd.DataFrame({"method": "a", "x": [60], "mean": 2.0, "low": 1.5, "high": 3.0})
    forms.lines(table, ax, by="method", x="x")
    (bars,) = ax.containers
    assert bars.lines[2][0].get_segments()[0].tolist() == [[60, 1.5], [60, 3.0]]


@pytest.mark.usefixtures("styled")
def test_names_at_the_ends_of_lines_keep_apart_and_in_order():
    (ax,) = plotting.new_figure(width=7)
    ends = pd.DataFrame({"method": [*"abcdef"], "loss": [1.0, 1.001, 1.002, 1.003, 2, 1.004], "chosen": False})
    table = pd.concat([ends.assign(learning_rate=rate) for rate in (1e-4, 1e-3)])
    plotting.plot(table.assign(seeds=3), ax, "learning_rates")
    ax.figure.draw_without_rendering()
    names = [text for text in ax.texts if len(text.get_text()) == 1]
    boxes = [Text.get_window_extent(text) for text in names]
    assert [text.get_text() for text in names] == [*"abcdfe"]
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))
    assert "mean of 3 seeds" in ax.get_ylabel()
    marked = [line.get_xdata()[0] for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert marked == [1e-4, 1e-3]


def test_the_name_of_a_level_stands_on_the_side_where_nothing_is_drawn():
    left, right = plotting.new_figure(2)
    for ax, level in ((left, 0.0), (right, 1.0)):
        ax.plot([0.1, 0.9], [0, 1])
        plotting.levels(pd.Series({"level": level}), ax)
        (low, high), (name, _) = ax.get_xlim(), ax.texts
        assert low < level < high
        assert name.get_ha() == ("right" if level == 0 else "left")


def test_a_step_has_a_place_and_a_setting_a_colour_beside_zero():
    (ax,) = plotting.new_figure()
    plotting.plot(step_changes(), ax, "decomposition")
    (small, large), (zero,) = ax.containers, [line for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["operators", "all"]
    for bars, means, half in ((small, [0.25, -0.5], 0.5), (large, [0.5, 1.0], 0.25)):
        assert bars.lines[0].get_xdata().tolist() == means
        assert np.round(bars.lines[0].get_ydata().astype(float)).tolist() == [0, 1]
        (reach,) = bars.lines[2]
        assert [np.ptp(bar[:, 0]) for bar in reach.get_segments()] == [2 * half] * 2
    assert small.lines[0].get_ydata()[0] < large.lines[0].get_ydata()[0]
    assert small.lines[0].get_color() != large.lines[0].get_color()
    assert set(zero.get_xdata()) == {0}


def test_panels_are_told_apart_in_the_saved_data(tmp_path):
    axes = plotting.new_figure(2)
    for ax, title in zip(axes, ("heads", "channels"), strict=True):
        plotting.plot(masking(), ax, "masking_curve")
        ax.set_title(title)
    table = pd.read_csv(plotting.save_figure(axes, "two", folder=tmp_path)[2])
    assert table["panel"].value_counts().to_dict() == {"heads": 9, "channels": 9}


@pytest.mark.parametrize("name", plotting.FIGURES)
def test_a_figure_of_the_suite_is_drawn_from_the_table_beside_it(name, tmp_path):
    makes = [make for (figure, _), make in PANELS.items() if figure == name]
    panels = dict(zip(["null", "a, b"], 2 * makes, strict=False))
    tables = [make().assign(panel=panel) for panel, make in panels.items()]
    for each in tables:
        numbers = each.select_dtypes("float").columns
        each[numbers] = each[numbers] * (1 + 1e-9) / 3  # more digits than the file keeps
    table = pd.concat(tables)
    first = [path.read_bytes() for path in plotting.draw_figure(table, name, tmp_path)]
    drawn = plt.gcf().axes
    assert [ax.get_title() for ax in drawn if ax.get_title()] == list(panels)
    for ax, make in zip([ax for ax in drawn if ax.get_title()], panels.values(), strict=True):
        whole = set(make().select_dtypes("int"))
        assert whole <= set(ax._plotted.select_dtypes("int"))  # also where another panel has no such column
    for path in tmp_path.glob("*.[ps]*g"):
        path.unlink()
    assert [path.read_bytes() for path in plotting.redraw_figure(name, tmp_path)] == first


@pytest.mark.parametrize("name", plotting.FIGURES)
def test_a_recorded_figure_has_room_for_all_its_words(name, tmp_path):
    shutil.copy(RECORDED / f"{name}.csv", tmp_path)
    figure = plotting.redraw_figure(name, tmp_path).figure
    figure.draw_without_rendering()  # it was drawn for a file, with other pixels
    panels = [ax for ax in figure.axes if hasattr(ax, "_plotted")]
    assert panels
    for words in (*figure.legends, *panels):
        box = words.get_tightbbox()
        assert all(figure.bbox.padded(1).contains(*corner) for corner in (box.min, box.max)), words
    for ax in panels:
        assert ax.bbox.height > 0.3 * figure.bbox.height
        for axis, along in ((ax.xaxis, 0), (ax.yaxis, 1)):
            labels = [label for label in axis.get_ticklabels() if label.get_text() and label.get_visible()]
            for one, other in pairwise(labels):
                gap = np.ptp([text.get_transform().transform(text.get_position())[along] for text in (one, other)])
                turn = np.radians(one.get_rotation() if along == 0 else 90)
                if turn:  # lines of text beside one another
                    assert gap * np.sin(turn) > one.get_size() * figure.dpi / 72, one
                else:
                    assert gap > sum(text.get_window_extent().width for text in (one, other)) / 2, one


@pytest.mark.parametrize("count", [2, 12, 30])
def test_names_of_levels_stand_clear_of_what_is_compared(count, tmp_path):
    rows = pd.DataFrame({"method": [f"m{n}" for n in range(count)], "mean": 1.0, "low": 0.5, "high": 1.5})
    level = pd.DataFrame({"method": ["far"], "mean": [90.0]})
    figure = plotting.draw_figure(pd.concat([rows, level]), "instruction", tmp_path).figure
    figure.draw_without_rendering()
    (ax,) = figure.axes
    (name,) = [text for text in ax.texts if text.get_text()]
    first = ax.transData.transform((1.0, 0))[1] + 3 * figure.dpi / 72  # the upper end of a marker or a cap
    assert name.get_text() == "far: 90.00 →"
    assert name.get_window_extent().y0 >= first


@pytest.mark.parametrize("name", plotting.FIGURES)
def test_every_recorded_figure_says_in_a_sentence_what_its_table_shows(name):
    caption, said = plotting.told(name, RECORDED)
    assert caption == plotting.FIGURES[name]["caption"]
    assert said.endswith(".")
    assert re.search(r"\d", said)
    assert not re.search(r"nan|inf|Name:|dtype", said)


def test_sentences_are_made_from_the_numbers_of_the_table():
    curve = pd.DataFrame({"method": ["full", "apex"] * 2, "tokens": [1e6, 1e6, 2e6, 2e6], "panel": "above full"})
    curve = curve.assign(mean=[0, 0.1, 0, 0.25], low=[0, 0, 0, 0.125], high=[0, 0.2, 0, 0.375])
    said = sentence("continued", curve)
    assert said == "After 2 million tokens, above full: apex +0.25 [+0.125, +0.375] nats per token."
    masked = pd.concat([masking().assign(share=lambda rows: rows["share"] / 5), paired()]).assign(component="head")
    masked = masked[masked["share"].isin([0, 0.1]) | masked["order"].isna()].assign(low=0, high=0)
    masked.loc[masked["order"].isna(), "share"] /= 5
    said = sentence("masking_curve", masked)
    assert said == (
        "In nats per token, silencing the most active 10% of heads costs +1.5, +1 more than the least active."
    )
    grid = rates()
    assert sentence("learning_rates", grid).endswith("at an end of the grid: apex, full.")
    wider = pd.concat([grid, grid.assign(learning_rate=grid["learning_rate"] * [0.1, 10, 0.1, 10], chosen=False)])
    assert sentence("learning_rates", wider) == "Chosen: 0.001 for apex; 0.003 for full; at an end of the grid: none."
    assert sentence("movement_by_role", pd.concat([by_role(), lives()])) == (
        "Movement under full: advantageous 0.0%, disadvantageous 10.0%, directly tuned 20.0%, frozen 30.0%; 50% of the "
        "units frozen at first were trained in a later stage."
    )
    assert sentence("masking_curve", measured_masking().drop(columns="component")) == ""  # has no intervals yet


def test_a_notebook_shows_the_picture_then_the_caption_and_the_sentence_once(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *parts: shown.extend(parts))
    drawing = plotting.draw_figure(by_method(), "update_rank", tmp_path)
    drawing._ipython_display_()
    picture, text = shown
    assert picture.data == (tmp_path / "update_rank.png").read_bytes()
    pixels = plt.imread(tmp_path / "update_rank.png").shape[1]
    assert 1.5 < pixels / picture.width <= 2
    assert text.data == " ".join(plotting.told("update_rank", tmp_path))
    assert "from 0.1 (full) to 0.2 (apex)" in text.data
    assert not plt.get_fignums()  # which the kernel would show at the end of the cell


def test_a_single_panel_needs_no_title(tmp_path):
    plotting.draw_figure(curve(), "loss_curve", tmp_path)
    assert [ax.get_title() for ax in plt.gcf().axes] == [""]


def test_a_level_to_compare_with_is_drawn_across(tmp_path):
    level = pd.DataFrame({"model": ["chance"], "split": "reference", "loss": 6.5})
    (ax,) = plotting.new_figure()
    plotting.plot(pd.concat([curve(), level]), ax, "loss_curve")
    assert [line.get_ydata() for line in ax.get_lines() if line.get_linestyle() == ":"] == [[6.5, 6.5]]
    assert [text.get_text() for text in ax.texts] == ["chance"]
    assert "chance" not in " ".join(text.get_text() for text in ax.get_legend().get_texts())


def test_an_unknown_figure_and_an_empty_table_are_refused(tmp_path):
    for draw in (plotting.redraw_figure, partial(plotting.draw_figure, curve())):
        with pytest.raises(ValueError, match="figure 'pie' is not in FIGURES; known: loss_curve"):
            draw("pie", tmp_path)
    with pytest.raises(ValueError, match="figure 'loss_curve': the table has no rows"):
        plotting.draw_figure(curve()[:0], "loss_curve", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_figure_without_its_data_is_refused(tmp_path):
    (ax,) = plotting.new_figure()
    ax.plot([1, 2])
    with pytest.raises(ValueError, match=r"figure 'bare': every ax must come from apexlib\.plot"):
        plotting.save_figure(ax, "bare", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_step_costs_are_drawn_from_above_with_their_quartiles():
    (ax,) = plotting.new_figure()
    plot_step_costs(step_costs(), ax)
    time, peak = (line.get_xydata().tolist() for line in ax.get_lines()[:2])
    assert np.round(time, 9).tolist() == [[1.0, 1.14], [0.75, 0.14]]
    assert np.round(peak, 9).tolist() == [[1.0, 0.86], [0.5, -0.14]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["full", "apex"]
    (bars,) = ax.collections
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [[0.5, 1.5], [0.5, 1.0]]


def test_a_biography_is_drawn_unit_by_unit_in_the_colours_of_roles():
    (ax,) = plotting.new_figure()
    plotting.plot(lives(), ax, "movement_by_role", panel=1)
    names = list(ROLES)
    drawn = [[names[code] for code in row] for row in ax.images[0].get_array().tolist()]
    told = [
        ["source", "source"],
        ["target", "direct"],
        ["direct", "target"],
        ["frozen", "direct"],
        ["frozen", "frozen"],
    ]
    assert drawn == told


def measured_masking():
    """What `masking_curve` gives, in three orders; the random one has three draws."""
    rows = [
        ("channel", order, seed, share, slope * share * (1 + seed))
        for order, slope, seeds in (("advantageous", 3.0, 1), ("random", 1.0, 3), ("disadvantageous", 0.1, 1))
        for seed in range(seeds)
        for share in (0.0, 0.5, 1.0)
    ]
    return pd.DataFrame(rows, columns=["component", "order", "seed", "share", "increase"])


def measured_ranks():
    """What `update_table` gives, of two seeds."""
    where = {"layer": [-1, 0, 0, 1, 1], "role": ["embed_tokens", *["gate_proj", "v_proj"] * 2]}
    one = pd.DataFrame(where | {"effective_rank": [9.0, 1, 2, 3, 4], "random": 10.0, "frobenius": 1.0})
    return pd.concat([one.assign(seed=seed, effective_rank=one["effective_rank"] + seed) for seed in (0, 1)])


def measured_imbalance():
    rows = {"layer": [0, 0, 1, 1], "component": ["head", "channel"] * 2, "cv": [0.1, 1.0, 0.2, 2.0]}
    return pd.DataFrame(rows | {"gini": 0.5})


def measured_movement():
    return lives().assign(relative=np.linspace(0.1, 1, 10)).query("stage == 0")


def log():
    columns = {"stage": [0, 0, 0, 1, 1], "step": [1, 2, 2, 3, 4], "loss": [3.0, 2.0, None, 1.5, 1.0]}
    return pd.DataFrame(columns | {"eval_loss": [None, None, 2.5, None, None], "gradient_norm": 1.0})


TABLES = {  # a plot, a table as it is measured, x and y of its first line or bar
    "masking": (plot.masking, measured_masking, ([0, 0.5, 1], [0, 1.5, 3])),
    "activations": (plot.activations, activations, ([0.01, 0.03], [2.0, 48 / 24.5])),
    "imbalance": (plot.imbalance, measured_imbalance, ([0, 1], [0.1, 0.2])),
    "spectrum": (plot.spectrum, measured_ranks, ([0, 1], [0.15, 0.35])),
    "updates": (plot.updates, measured_ranks, ([0, 1], [0.15, 0.35])),
    "movement": (plot.movement, lambda: measured_movement().drop(columns="role"), ([0.1, 0.3], [0.5 / 0.3, 0.4 / 0.3])),
    "training": (plot.training, log, ([1, 2, 3, 4], [3, 2, 1.5, 1])),
}


@pytest.mark.parametrize(("draw", "make", "first"), TABLES.values(), ids=TABLES)
def test_a_table_of_the_library_is_drawn_as_it_was_measured(draw, make, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(mpl.rcParams)
    ax = draw(make())
    x, y = ax.get_lines()[0].get_xydata().T
    np.testing.assert_allclose((x[: len(first[0])], y[: len(first[1])]), first)
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert not ax.spines["top"].get_visible()  # the project's style
    assert dict(mpl.rcParams) == before
    assert not list(tmp_path.iterdir())
    mine = plt.figure().subplots()
    assert draw(make(), mine) is mine
    assert mine.spines["top"].get_visible()  # one's own style
    plotting.save_figure(ax, "own", folder=tmp_path)
    assert len(pd.read_csv(tmp_path / "own.csv")) == len(make())


def test_every_plot_is_tried():
    assert {*TABLES, "biography", "weight"} == set(plot.__all__) == set(dir(plot))


@pytest.mark.parametrize("draw", [getattr(plot, name) for name in plot.__all__])
def test_a_table_without_its_columns_is_refused_before_anything_is_drawn(draw):
    with pytest.raises(ValueError, match=r"the table has no column .*: need .*; it has colour, taste"):
        draw(pd.DataFrame({"colour": [1], "taste": [2]}))
    assert not plt.get_fignums()


def test_bands_are_intervals_over_draws():
    table = measured_masking()
    drawn = plot.masking(table).collections[0].get_paths()[0].vertices
    means = summarise(table.query("order == 'random'"), ["share"], "increase").set_index("share")
    assert drawn[drawn[:, 0] == 1, 1].max() == pytest.approx(means["high"][1])
    assert drawn[drawn[:, 0] == 1, 1].min() == pytest.approx(means["low"][1])
    again = plot.masking(summarise(table, ["order", "share"], "increase"))
    np.testing.assert_allclose(again.collections[0].get_paths()[0].vertices, drawn)


def test_what_must_not_be_averaged_is_refused():
    both = pd.concat([measured_masking(), measured_masking().assign(component="head")])
    with pytest.raises(ValueError, match="the table has component channel, head: need one, such as 'channel'"):
        plot.masking(both)
    stages = pd.concat([measured_ranks().assign(method="apex", stage=stage) for stage in (0, 1)])
    with pytest.raises(ValueError, match="the table has stage 0, 1: need one, such as 0"):
        plot.updates(stages)


def test_updates_of_several_runs_are_drawn_by_method():
    runs = pd.concat([measured_ranks().assign(method=method) for method in ("full", "apex")])
    ax = plot.updates(runs)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["full", "apex"]
    np.testing.assert_allclose(ax.get_lines()[0].get_xydata()[:, 1].astype(float), 0.3)  # without the embeddings


def test_movement_with_roles_is_drawn_by_role():
    ax = plot.movement(measured_movement())
    heights = [dots[0].get_ydata()[0] for dots in ax.containers if isinstance(dots, ErrorbarContainer)]
    means = measured_movement().groupby("role")["relative"].mean()
    assert heights == pytest.approx([means[role] for role in ROLES])


def test_a_figure_of_the_suite_takes_what_was_measured_and_writes_nothing_where_it_cannot(tmp_path):
    before = dict(mpl.rcParams)
    plotting.new_figure()
    paths = plotting.draw_figure(measured_masking(), "masking_curve", tmp_path)
    assert dict(mpl.rcParams) == before
    assert [path.suffix for path in paths] == [".svg", ".png", ".csv"]
    plt.close("all")
    with pytest.raises(ValueError, match="figure 'instruction': the table has no column method, mean, low, high"):
        plotting.draw_figure(measured_masking(), "instruction", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert not plt.get_fignums()


def test_a_comparison_shows_runs_beside_their_mean_and_levels_that_do_not_stretch_it():
    runs = pd.DataFrame({"method": ["apex", "full"], "mean": [0.9, 2.2], "seed": 0})
    levels = pd.DataFrame({"method": ["near", "far"], "mean": [2.6, 90.0]})
    ax = plotting.new_figure()[0]
    plotting.comparison(pd.concat([comparison(), runs, levels]), ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["apex", "full"]
    dots, means = ax.collections[0].get_offsets(), ax.collections[-1].get_offsets()
    assert dots[:, 0].tolist() == [0.9, 2.2]
    assert means[:, 0].tolist() == [1.0, 2.0]
    assert [text.get_text() for text in ax.texts] == ["near", "far: 90.00 →"]
    assert ax.get_xlim()[1] < 10


def test_gains_are_shown_over_the_mean_of_their_seed():
    ax = plotting.new_figure()[0]
    plotting.rank_gain(gains(), ax)
    marked = [line for line in ax.get_lines() if line.get_marker() != "None"]
    drawn = [y for line in marked for y in line.get_ydata()]
    assert sorted(round(float(y), 9) for y in drawn) == [-0.1, -0.1, 0.1, 0.1]
