"""How far apart methods end within a seed, from tables of runs alone; no torch."""

import re
from collections.abc import Mapping

import pandas as pd

from apexlib.analysis.intervals import summarise

_OF_A_SIZE = re.compile(r"(apex|direct|lora)((-rows)?-[\d.]+%)?")  # variants that differ by how much trains


def paired_differences(table: pd.DataFrame, pairs: Mapping[str, tuple[str, str]], measure: str) -> pd.DataFrame:
    """How much `measure` differs within each `seed`, of pairs of methods by name: `method` (the name), `above`.

    `above` is that of a pair's second method less that of its first; pairs that the table does not have are left out.

    >>> runs = pd.DataFrame({"method": ["full", "apex"], "seed": 0, "loss": [0.5, 0.25]})
    >>> paired_differences(runs, {"all": ("full", "apex"), "operators": ("direct", "apex")}, "loss").values.tolist()
    [[0, 'all', -0.25]]
    """
    by_seed = table.pivot(index="seed", columns="method", values=measure)
    pairs = {name: pair for name, pair in pairs.items() if {*pair} <= {*by_seed}}
    above = pd.DataFrame({name: by_seed[second] - by_seed[first] for name, (first, second) in pairs.items()})
    return above.melt(var_name="method", value_name="above", ignore_index=False).reset_index()


def by_share(runs: pd.DataFrame, measures: Mapping[str, str]) -> pd.DataFrame:
    """How far apart from "full" methods end within a seed, by the share of parameters that they train.

    `runs` are chosen ones of notebook 03, `measures` columns of it, each with the name of its panel. Columns: `panel`,
    `method` ("apex", "direct" or "lora"; all rows directly are "restart"), `trainable`, `mean`, `low`, `high`, `n`.
    No rows where there is no "full".
    """
    sized = {name: found[1] for name in runs["method"].unique() if (found := _OF_A_SIZE.fullmatch(name))}
    sized |= {"restart": "direct"} if "restart" in set(runs["method"]) else {}
    pairs, trains = {name: ("full", name) for name in sized}, runs.groupby("method")["trainable"].mean()
    parts = [paired_differences(runs, pairs, name).assign(panel=title) for name, title in measures.items()]
    changes = pd.concat(parts, ignore_index=True)
    changes = changes.assign(trainable=changes["method"].map(trains), method=changes["method"].map(sized))
    columns = ["panel", "method", "trainable"]
    return summarise(changes, columns, "above").reindex(columns=[*columns, "mean", "low", "high", "n"])
