"""The tables of a run, as views and the overview read them: claims, and the trainings by method and learning rate."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd


class Records:
    """The tables of a run."""

    def __init__(self, source: str | Path | Mapping[str, pd.DataFrame]) -> None:
        if not isinstance(source, Mapping):
            source = {name: pd.read_csv(Path(source) / f"{name}.csv") for name in ("claims", "instruction")}
        if missing := {"claims", "instruction"} - set(source):
            raise ValueError(f"tables {', '.join(source) or 'none'}: need {' and '.join(sorted(missing))} too")
        self.claims, self.runs = source["claims"], source["instruction"]
        self.values = source.get("values", pd.DataFrame(columns=["claim", "seed", "value"]))
        counts = self.runs.select_dtypes("number").drop(columns=["learning_rate", "seed"]).count()
        # first what rates are chosen by, then what most runs have
        self.measures = sorted(counts.index, key=lambda name: (name != "valid_loss", -counts[name]))

    def chosen(self, verdict: str, words: str) -> pd.DataFrame:
        """Claims of a verdict ("all": any) whose texts have every word."""
        claims = self.claims if verdict == "all" else self.claims[self.claims["verdict"] == verdict]
        texts = claims.select_dtypes(exclude="number").fillna("").astype(str).agg(" ".join, axis=1).str.lower()
        return claims[[all(word in text for word in words.lower().split()) for text in texts]]

    def chart(self, measure: str, methods: tuple[str, ...]) -> pd.DataFrame:
        """Mean and range over seeds, where measured: `method`, `learning_rate`, `mean`, `min`, `max`, `count`."""
        runs = self.runs[self.runs["method"].isin(methods)].groupby(["method", "learning_rate"], sort=False)
        return runs[measure].agg(["mean", "min", "max", "count"]).reset_index().dropna().sort_values("learning_rate")
