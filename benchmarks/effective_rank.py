"""Effective rank by a float64 Gram matrix against `torch.linalg.svdvals` in float32: time and error over spectra.

    python -m benchmarks.effective_rank [--rows 1024] [--columns 2816] [--repeats 3] [--out FOLDER]
    python -m benchmarks.effective_rank --peers [--out FOLDER]

Each repeat times both on the same matrix, one after the other; `ratio` is the median of time(svdvals) / time(ours)
within repeats. Errors of the effective rank are relative, against a float64 SVD of the same stored values. `--peers`
takes matrices of the shapes of a model of 7 B parameters, once each, through all that a user might call: minutes.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from scipy.linalg import svdvals

from apexlib.analysis.spectrum import effective_rank, measures
from apexlib.provenance import save_table

T = TypeVar("T")


def spectra(n: int) -> dict[str, np.ndarray]:
    """Singular values from 1 down, by name."""
    i = np.arange(n)
    return {
        "flat": np.ones(n),
        "power law, 1/2": (i + 1.0) ** -0.5,
        "power law, 2": (i + 1.0) ** -2,
        "exponential to 1e-4": 1e-4 ** (i / n),
        "exponential to 1e-8": 1e-8 ** (i / n),
        "exponential to 1e-16": 1e-16 ** (i / n),
        "rank 64": (i < 64) * 1.0,
    }


def matrices(rows: int, columns: int) -> dict[tuple[str, str], torch.Tensor]:
    """One matrix per spectrum and dtype, and a Gaussian one, which trained weights are close to."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    small = min(rows, columns)
    left, right = (torch.linalg.qr(draw(side, small)).Q for side in (rows, columns))
    exact = {name: left * torch.from_numpy(sigma) @ right.T for name, sigma in spectra(small).items()}
    exact["Gaussian"] = draw(rows, columns)
    rounded = ("power law, 1/2", "exponential to 1e-8", "rank 64")
    found = {(name, "float32"): matrix.float() for name, matrix in exact.items()}
    return found | {(name, "bfloat16"): exact[name].bfloat16() for name in rounded}


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def compare(name: str, dtype: str, matrix: torch.Tensor, repeats: int) -> dict[str, object]:
    """Time both within each repeat, and measure the error of each."""
    single, times = matrix.float(), []
    for _ in range(repeats):
        svd, sigma = timed(lambda: torch.linalg.svdvals(single))
        ours, rank = timed(lambda: effective_rank(matrix))
        times.append((svd, ours))
    exact, by_svd = (
        measures(values.double().numpy())["effective_rank"] for values in (torch.linalg.svdvals(matrix.double()), sigma)
    )
    return {
        "spectrum": name,
        "dtype": dtype,
        "effective_rank": exact,
        "svdvals_seconds": median(svd for svd, _ in times),
        "seconds": median(ours for _, ours in times),
        "ratio": median(svd / ours for svd, ours in times),
        "error": abs(rank / exact - 1),
        "svdvals_error": abs(by_svd / exact - 1),
    }


def peers(shapes: Mapping[str, tuple[int, int]]) -> pd.DataFrame:
    """Measure one float32 matrix of each shape by every way to its singular values, in seconds of CPU time.

    Its spectrum falls as those of trained weights do. `ratio`: over ours; `error`: to SciPy's in float64.
    """
    ways: dict[str, Callable[[torch.Tensor], float]] = {
        "ours": effective_rank,
        "torch.linalg.svdvals, float32": lambda matrix: _of(torch.linalg.svdvals(matrix).double().numpy()),
        "torch.linalg.svdvals, float64": lambda matrix: _of(torch.linalg.svdvals(matrix.double()).numpy()),
        "SciPy in float32": lambda matrix: _of(svdvals(matrix.numpy()).astype("float64")),
        "SciPy in float64, as WeightWatcher": lambda matrix: _of(svdvals(matrix.double().numpy())),
    }
    rows, generator = [], torch.Generator().manual_seed(0)
    for name, (height, width) in shapes.items():
        matrix = torch.randn(height, width, generator=generator) * torch.arange(1.0, height + 1)[:, None] ** -0.5
        for way, call in ways.items():
            start = time.process_time()
            found = call(matrix)
            rows.append((name, height, width, way, time.process_time() - start, found))
    table = pd.DataFrame(rows, columns=["matrix", "rows", "columns", "way", "seconds", "effective_rank"])
    grouped = table.groupby("matrix")
    ours, exact = (
        grouped[column].transform(which) for column, which in (("seconds", "first"), ("effective_rank", "last"))
    )
    return table.assign(ratio=table["seconds"] / ours, error=(table["effective_rank"] / exact - 1).abs())


def _of(sigma: np.ndarray) -> float:
    return measures(sigma)["effective_rank"]


def main(arguments: list[str] | None = None) -> None:
    """Run all comparisons, print the table, write it if a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2816)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", action="store_true", help="every way to singular values, on matrices of a 7 B model")
    parser.add_argument("--out", type=Path, help="folder for effective_rank_speed.csv or effective_rank_peers.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peers:
        effective_rank(torch.eye(8))
        table = peers({"query, key, value or output": (4096, 4096), "gate, up or down": (4096, 11008)})
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
        if options.out:
            print(save_table(table, "effective_rank_peers", options.out, threads=options.threads))
        return
    found = matrices(options.rows, options.columns)
    effective_rank(next(iter(found.values())))  # imports and first calls are not timed
    table = pd.DataFrame([compare(*key, matrix, options.repeats) for key, matrix in found.items()])
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE")
    facts = {"shape": [options.rows, options.columns], "repeats": options.repeats, "threads": options.threads}
    if options.out:
        facts["environment"] = {name: os.environ.get(name) for name in names}
        print(save_table(table, "effective_rank_speed", options.out, **facts))


if __name__ == "__main__":
    main()
