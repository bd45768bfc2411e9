"""Spectra of the matrices of several versions of a model, and of their updates, beside random matrices."""

from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd
from jaxtyping import Float

from apexlib.analysis.spectrum import Model, marchenko_pastur_rank, matrices, measures, singular_values


class Spectra:
    """Spectra of the matrices of a base and of other models of its shape, by name."""

    def __init__(self, base: Model, others: Mapping[str, Model] | None = None) -> None:
        self.models = {name: matrices(source) for name, source in {"base": base, **(others or {})}.items()}
        self.weights = list(self.models["base"])
        for name, found in self.models.items():
            if missing := [weight for weight in self.weights if weight not in found]:
                raise ValueError(f"{name}: has no {missing[0]}, which the base has; need versions of one model")
        self.rows: list[dict[str, object]] = []
        self.sigma = cache(self.sigma)

    def sigma(self, weight: str, model: str, update: bool) -> tuple[Float[np.ndarray, " rank"], float]:
        """Singular values, descending, of W of a model or of its ΔW = W − W_base; the edge of a random matrix.

        The edge is the largest singular value that a large matrix of this shape and norm has if its entries are
        independent: s (√m + √n) with s² = ‖W‖² / mn (Marchenko & Pastur 1967).
        """
        matrix = self.models[model][weight]()
        if update:
            matrix = matrix.double() - self.models["base"][weight]().double()
        (rows, columns), sigma = matrix.shape, singular_values(matrix)
        edge = float(np.linalg.norm(sigma) * (rows**-0.5 + columns**-0.5))
        row = {"weight": weight, "model": model, "matrix": "ΔW" if update else "W", **measures(sigma), "edge": edge}
        above = {"above_edge": int((sigma > edge).sum()), "random": marchenko_pastur_rank(rows, columns)}
        self.rows.append(row | above)
        return sigma, edge

    @property
    def table(self) -> pd.DataFrame:
        """What was measured so far: `weight`, `model`, `matrix` ("W" or "ΔW"), the `SPECTRAL_MEASURES`, `edge`.

        `above_edge` counts singular values above it; `random` is the effective rank of a random matrix of that shape.
        """
        return pd.DataFrame(self.rows)
