"""How effective rank changes: by a small step in theory, in constructed matrices, and in runs beside its nulls.

With sources P, targets N and other rows F, an operator M takes W = [P; N; F] to E W = [P; N + M P; F]. That adds no
direction: rank(E W) = rank(W), so all it can do is to even out the singular values that are there.
"""

from collections.abc import Sequence
from itertools import product

import pandas as pd
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from apexlib.analysis.intervals import spearman, summarise
from apexlib.analysis.spectrum import Model, effective_rank, layer_and_role, matrices

_K = 24  # sources, and as many targets
_OTHERS = _DIM = 64
_FEW = 4  # directions that crowded rows lie in
_SOURCE, _TARGET = slice(_K), slice(_K, 2 * _K)
_FLAT = "flat spectrum"
_CASES = {  # which rows are crowded, if any, how long they are, and the sign of the change that theory demands
    "targets crowded and long": (_TARGET, 16, 1),  # what is weak grows
    "targets crowded": (_TARGET, 1, 0),
    "targets spread": (None, 1, -1),  # targets come to repeat the sources
    "sources crowded and long": (_SOURCE, 4, -1),  # what is strong grows
    _FLAT: (None, 1, -1),  # erank is at its bound, the rank
}


def log_rank_change(weight: Float[Tensor, "rows columns"], step: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """Compute d ln erank = −Σᵢ (ln pᵢ + H) uᵢᵀ dW wᵢ / Σσ for a small step dW, with H = −Σ pᵢ ln pᵢ and p = σ / Σσ.

    The bracket is negative where σᵢ < Σσ / erank: the effective rank rises if what grows lies below that bound. Needs
    distinct, positive singular values.

    >>> weight = torch.diag(torch.tensor([2.0, 1.0]))
    >>> log_rank_change(weight, torch.diag(torch.tensor([0.0, 0.1]))) > 0  # the smaller one grows
    tensor(True)
    """
    u, sigma, w = torch.linalg.svd(weight, full_matrices=False)
    p = sigma / sigma.sum()
    entropy = -(p * p.log()).sum()
    return -((p.log() + entropy) * (u.T @ step @ w.T).diagonal()).sum() / sigma.sum()


def constructed_changes(strengths: Sequence[float], draws: int) -> pd.DataFrame:
    """Expand constructed matrices: how the effective rank changes, `draws` times for each case and strength.

    Columns: `case`; `sign` of the change that theory demands, 0 where it demands none; `strength`, ‖M P‖ in units of
    ‖P‖ (Frobenius); `seed`; `change` of effective rank by N + M P, relative; `chance`, by random rows of that norm.
    M is Gaussian. Crowded rows lie in 4 of 64 dimensions; long targets are 16 times, long sources 4 times as long as
    other rows.
    """
    rows = []
    for case, strength, seed in product(_CASES, (0.0, *strengths), range(draws)):
        generator, (crowded, length, sign) = torch.Generator().manual_seed(seed), _CASES[case]
        before = random_rows(2 * _K + _OTHERS, _DIM, generator)
        if crowded:
            before[crowded] = length * random_rows(_K, _FEW, generator) @ random_rows(_FEW, _DIM, generator)
        if case == _FLAT:
            before = torch.linalg.qr(before).Q
        source, start = before[_SOURCE], effective_rank(before)
        row = {"case": case, "sign": sign, "strength": strength, "seed": seed}
        steps = {"change": random_rows(_K, _K, generator) @ source, "chance": random_rows(_K, _DIM, generator)}
        for name, step in steps.items():  # M P, and rows at random
            after = before.clone()
            after[_TARGET] += strength * step * source.norm() / step.norm()
            row[name] = effective_rank(after) / start - 1
        rows.append(row)
    return pd.DataFrame(rows)


def movement(base: Model, model: Model) -> dict[str, float]:
    """How far training moved the weight matrices inside layers, and how their effective rank changed.

    `update_norm`: ‖W − W_base‖ / ‖W_base‖ over all of them at once (Frobenius); `erank_change`: the relative change of
    a matrix's effective rank, mean over matrices.
    """
    after = matrices(model)
    moved, whole, changes = 0.0, 0.0, []
    for name, read in matrices(base).items():
        if layer_and_role(name)[0] >= 0:
            old, new = read().double(), after[name]().double()
            moved, whole = moved + float((new - old).square().sum()), whole + float(old.square().sum())
            changes.append(effective_rank(new) / effective_rank(old) - 1)
    return {"update_norm": (moved / whole) ** 0.5, "erank_change": sum(changes) / len(changes)}


def rank_changes(updates: pd.DataFrame) -> pd.DataFrame:
    """From `update_table`s with `method`, `seed` and `stage`: the relative change of each matrix's effective rank.

    Columns: those keys, `layer`, `role`, `weight`, `rows`, `columns`, `effective_rank`, `before`; `by_chance`, moved
    as far by Gaussian noise; `random`, of a random matrix; `change` and `change_by_chance`, relative to `before`.
    """
    keys = ["method", "seed", "stage", "layer", "role", "weight", "rows", "columns"]
    table = updates[[*keys, "after", "before", "by_chance", "random"]].rename(columns={"after": "effective_rank"})
    change, by_chance = (table[name] / table["before"] - 1 for name in ("effective_rank", "by_chance"))
    return table.assign(change=change, change_by_chance=by_chance)


def final_stage(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the matrices inside layers after the last stage of each run; `layer` is −1 of embeddings and LM head."""
    inside = table[table["layer"] >= 0]
    return inside[inside["stage"] == inside.groupby(["method", "seed"])["stage"].transform("max")]


def beside_null(table: pd.DataFrame, value: str, null: str) -> pd.DataFrame:
    """Summarise `value` by method, over seeds of means over matrices, with the mean of its `null`."""
    runs = table.groupby(["method", "seed"], sort=False, as_index=False)[[value, null]].mean()
    nulls = runs.groupby("method", sort=False, as_index=False)[null].mean().rename(columns={null: "null"})
    return summarise(runs, ["method"], value).merge(nulls)


def rank_panels(ranks: pd.DataFrame) -> pd.DataFrame:
    """What the figure `effective_rank` shows: the base models by layer, and what fine-tuning changed."""
    final = final_stage(ranks)
    start = final[final["method"] == final["method"].iloc[0]]
    start = start.assign(share=start["before"] / start["random"], panel="before fine-tuning")
    change = beside_null(final, "change", "change_by_chance").assign(panel="by fine-tuning")
    return pd.concat([start[["layer", "role", "share", "panel"]], change], ignore_index=True)


def update_ranks(updates: pd.DataFrame) -> pd.DataFrame:
    """Of the matrices that moved, after the last stage: `rank_share`, the update's effective rank to a random matrix's.

    `noise_share` is what rounding alone may have moved, of the update; the share of a random matrix (`null`) is 1.
    """
    moved = final_stage(updates[updates["frobenius"] > 0])
    rank, noise = moved["effective_rank"] / moved["random"], moved["noise_frobenius"] / moved["frobenius"]
    return moved.assign(rank_share=rank, noise_share=noise, null=1.0)


def rank_gain(ranks: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Set each run's mean change of effective rank beside its gain in answer loss over the base of its seed.

    `runs` has `method`, `seed` and `answer_loss`, a row of method "base" per seed among them; where a seed has none,
    the first is its base. `erank_change_excess` is the change less the change by chance.
    """
    keys = ["method", "seed"]
    base = runs[runs["method"] == "base"].set_index("seed")["answer_loss"]
    by_run = final_stage(ranks).groupby(keys, sort=False, as_index=False)[["change", "change_by_chance"]].mean()
    table = runs[[*keys, "answer_loss"]].merge(by_run, on=keys)
    table.columns = [*keys, "answer_loss", "erank_change", "erank_change_by_chance"]
    table["erank_change_excess"] = table["erank_change"] - table["erank_change_by_chance"]
    table["answer_loss_gain"] = table["seed"].map(base).fillna(base.iloc[0]) - table.pop("answer_loss")
    return table


def rank_correlation(gain: pd.DataFrame) -> pd.DataFrame:
    """Correlate `erank_change` and `answer_loss_gain` over the methods of a seed (Spearman's; NaN of fewer than 3)."""
    parts = gain.groupby("seed")
    rows = [(seed, len(part), spearman(part["erank_change"], part["answer_loss_gain"])) for seed, part in parts]
    return pd.DataFrame(rows, columns=["seed", "methods", "correlation"])


def random_rows(rows: int, columns: int, generator: Generator) -> Float[Tensor, "rows columns"]:
    """Draw Gaussian rows of expected length one."""
    return torch.randn((rows, columns), generator=generator, dtype=torch.float64) / columns**0.5
