"""Effective rank and its relatives, exact, of weights and of their updates, beside what chance and rounding would give.

Every quantity goes by its definition, because "effective rank" is the name of many: one and the same matrix ranges from
1 to its full rank over public definitions. See `spectral_measures` for formulas and sources.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from math import frexp
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.linalg import eigvalsh, qr, svdvals
from scipy.linalg.blas import dgemm, dsyrk, ssyrk
from scipy.linalg.lapack import dpotrf, dpstrf
from torch import Tensor, nn

from apexlib.analysis.stored import check_versions, stored_weights
from apexlib.expansion import is_expanded
from apexlib.progress import progress

Model = nn.Module | str | Path  # in memory, or a folder with safetensors files

SRANK_DELTA = 0.01
_TOLERANCE = 1e-6  # relative error of the effective rank that is let pass
_DEFICIENT = 1e-12  # of the largest: what a pivot of a Gram matrix is where the rank ends
_CHUNK = 1 << 22  # entries that are in float64 at a time


def effective_rank(matrix: Float[Tensor, "rows columns"] | Float[np.ndarray, "rows columns"]) -> float:
    """Effective rank of Roy & Vetterli: exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ (EUSIPCO 2007), from 1 to the rank.

    0 · ln 0 is 0. A zero matrix has effective rank 0, its rank. Raises ValueError for what is no matrix, is empty or
    holds NaN or infinite values.

    >>> [round(effective_rank(matrix), 6) for matrix in (torch.eye(5), torch.ones(4, 3), torch.zeros(2, 2))]
    [5.0, 1.0, 0.0]
    """
    return _exp_entropy(singular_values(matrix))


def spectral_measures(matrix: Float[Tensor, "rows columns"] | Float[np.ndarray, "rows columns"]) -> pd.Series:
    """Measure the singular values σ₁ ≥ σ₂ ≥ … of a matrix.

    - `effective_rank`: exp H(σ / Σσ), H(p) = −Σ pᵢ ln pᵢ (Roy & Vetterli, EUSIPCO 2007);
    - `effective_rank_sq`: exp H(σ² / Σσ²), the same of the energy, exp of a von Neumann entropy;
    - `stable_rank`: Σσ² / σ₁² = ‖W‖_F² / ‖W‖₂² (Rudelson & Vershynin, J. ACM 2007);
    - `participation_ratio`: (Σσ²)² / Σσ⁴, exp of the Rényi-2 entropy of the energy;
    - `srank`: the least k with Σ_{i≤k} σᵢ ≥ (1 − δ) Σσ, δ = 0.01 (Kumar et al. 2021, arXiv:2010.14498);
    - `nuclear` Σσ, `spectral` σ₁ and `frobenius` (Σσ²)^½, the norms.

    Ranks of a zero matrix are 0. Errors as in `effective_rank`.

    >>> matrix = torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    >>> spectral_measures(matrix).round(3).to_dict()  # doctest: +NORMALIZE_WHITESPACE
    {'effective_rank': 2.828, 'effective_rank_sq': 2.381, 'stable_rank': 1.5, 'participation_ratio': 2.0, 'srank': 3.0,
     'nuclear': 4.0, 'spectral': 2.0, 'frobenius': 2.449}
    """
    return pd.Series(measures(singular_values(matrix)))


def measures(sigma: Float[np.ndarray, " rank"]) -> dict[str, float]:
    """Compute the measures of `spectral_measures` from singular values in descending order."""
    nuclear, spectral = float(sigma.sum()), float(sigma[0])
    relative = sigma / spectral if spectral else sigma  # squares must not underflow
    energy = relative**2
    return {
        "effective_rank": _exp_entropy(sigma),
        "effective_rank_sq": _exp_entropy(energy),
        "stable_rank": float(energy.sum()),
        "participation_ratio": float(energy.sum() ** 2 / (energy**2).sum()) if spectral else 0.0,
        "srank": float(np.searchsorted(relative.cumsum(), (1 - SRANK_DELTA) * relative.sum()) + 1) if spectral else 0.0,
        "nuclear": nuclear,
        "spectral": spectral,
        "frobenius": float(spectral * energy.sum() ** 0.5),
    }


def singular_values(matrix: Float[Tensor, "rows columns"] | Float[np.ndarray, "rows columns"]) -> np.ndarray:
    """Singular values in float64, descending, as exact as the measures need them and many times faster than an SVD.

    They are the roots of the eigenvalues of the smaller Gram matrix in float64 (on a GPU for a tensor that lies there).
    That squares the condition number: an eigenvalue is off by about ε σ₁² (ε = 2.2e-16), so singular values below
    3e-8 σ₁ are lost in it. Where few directions carry all but rounding, these are taken off and the rest is measured
    by itself. Where what is lost could still cost 1e-6 of the effective rank, a float64 SVD takes over.
    """
    matrix = (matrix if isinstance(matrix, Tensor) else torch.from_numpy(np.array(matrix))).detach()
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"shape {tuple(matrix.shape)}: need a matrix with at least one entry")
    largest = max(abs(float(bound)) for bound in matrix.aminmax())
    if not np.isfinite(largest):
        raise ValueError(f"matrix of shape {tuple(matrix.shape)} holds NaN or infinite values")
    if not largest:
        return np.zeros(min(matrix.shape))
    scale = 2.0 ** (frexp(largest)[1] - 1)  # a power of two is exact; squares must neither overflow nor underflow
    with np.errstate(over="ignore"):
        sigma = _of_scale(matrix, scale) * scale
        if not np.isfinite(sigma.sum()):
            raise ValueError(f"entries up to {largest:.3g}: the singular values or their sum overflow float64")
    return sigma


def _of_scale(matrix: Float[Tensor, "rows columns"], scale: float) -> np.ndarray:
    """Singular values in units of `scale`."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if matrix.is_cuda:
        gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
        for part in matrix.split(max(1, 16 * _CHUNK // len(matrix)), dim=1):
            scaled = part.double() / scale
            gram.addmm_(scaled, scaled.T)
        sigma, error = _roots(torch.linalg.eigvalsh(gram).cpu().numpy()[::-1])
    else:
        gram = _gram(matrix, scale)
        if (sigma := _low_rank(matrix, gram, scale)) is not None:
            return sigma
        sigma, error = _roots(eigvalsh(gram, check_finite=False, overwrite_a=True)[::-1])
    return sigma if error < _TOLERANCE else _svd(matrix, scale)


def _gram(matrix: Float[Tensor, "short long"], scale: float) -> np.ndarray:
    """Lower half of W Wᵀ / scale², by the BLAS of scipy: half the time of torch's product."""
    short, long = matrix.shape
    gram = np.zeros((short, short), order="F")
    step = max(1, _CHUNK // short)
    for start in range(0, long, step):
        part = matrix[:, start : start + step].double().numpy() / scale
        # BLAS wants columns one after another: a part that lies row by row goes in transposed
        by_rows = part.flags.c_contiguous
        gram = dsyrk(1.0, part.T if by_rows else part, beta=1.0, c=gram, trans=by_rows, lower=1, overwrite_c=1)
    return gram


def _low_rank(matrix: Float[Tensor, "short long"], gram: np.ndarray, scale: float) -> np.ndarray | None:
    """Singular values where few directions carry all but rounding; None where a gap is not that clear.

    W = C Qᵀ + T, Q from the rows that a pivoted Cholesky factorisation of the Gram matrix picks. T is so small that
    its own Gram matrix resolves it, in float32. What both share in column space is taken from T; of second order.
    """
    short, most = len(gram), len(gram) // 8
    smallest = _DEFICIENT * gram.diagonal().max()
    factor, failed = dpotrf(gram[: most + 1, : most + 1], lower=1)
    if not most or (not failed and factor.diagonal().min() ** 2 > smallest):
        return None  # more than `most` rows are independent already
    _, pivots, rank, _ = dpstrf(gram, tol=smallest, lower=1)
    if rank > most:
        return None
    rows = np.asfortranarray(matrix.double().numpy().T / scale)  # the columns of this are rows of W
    basis, _ = qr(rows[:, pivots[:rank] - 1], mode="economic", check_finite=False)
    head = dgemm(1.0, rows, basis, trans_a=1)
    tail = dgemm(-1.0, basis, head, trans_b=1, beta=1.0, c=rows, overwrite_c=1)
    columns, factor = qr(head, mode="economic", check_finite=False)
    large, size = svdvals(factor), max(tail.max(), -tail.min())
    small = np.zeros(short - rank)
    if size:
        tail /= size
        half = ssyrk(1.0, tail.astype(np.float32), trans=1, lower=1).astype(float)
        rest = np.tril(half) + np.tril(half, -1).T
        rest -= columns @ (columns.T @ rest)
        rest -= (rest @ columns) @ columns.T
        small = size * np.sqrt(eigvalsh(rest.astype(np.float32), check_finite=False)[: rank - 1 : -1].clip(min=0))
    blur = 1e-3 * small[0] * len(small) / large.sum()  # float32 resolves √ε of the largest; times |ln p|, 25 or so
    return np.concatenate([large, small]) if small[0] < 1e-4 * large[-1] and 25 * blur < _TOLERANCE else None


def _svd(matrix: Float[Tensor, "short long"], scale: float) -> np.ndarray:
    if matrix.is_cuda:
        return torch.linalg.svdvals(matrix.double() / scale).cpu().numpy()
    return svdvals(matrix.double().numpy() / scale, check_finite=False, overwrite_a=True)


def _roots(eigenvalues: Float[np.ndarray, " rank"]) -> tuple[np.ndarray, float]:
    """Singular values from descending eigenvalues of a Gram matrix, and the relative error of their effective rank.

    Eigenvalues are off by about ν = ε σ₁². Those below 4ν are lost: their roots may be all noise, so what they add to
    the entropy is in doubt as a whole. For the others, δH = Σ δpᵢ |ln pᵢ + H| with δσᵢ = ν / 2σᵢ, in quadrature.
    """
    noise = np.finfo(float).eps * eigenvalues[0]
    sigma = np.sqrt(eigenvalues.clip(min=0))
    total, entropy = sigma.sum(), np.log(_exp_entropy(sigma))
    lost = (eigenvalues < 4 * noise) & (eigenvalues != 0)  # a row of zeros is no matter of rounding
    sure, share = sigma[sigma**2 >= 4 * noise] / total, sigma[lost].sum() / total
    error = np.linalg.norm(noise / (2 * sure * total**2) * np.abs(np.log(sure) + entropy))
    if share:
        error += share * abs(np.log(share / lost.sum()) + entropy)
    return sigma, float(error)


def _exp_entropy(weights: Float[np.ndarray, " n"]) -> float:
    total = weights.sum()
    if not total:
        return 0.0
    p = weights[weights > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()).clip(min=1.0))


SPECTRAL_MEASURES = tuple(measures(np.ones(1)))  # their names


def spectrum_table(source: Model, *, device: str | torch.device | None = None, processes: int = 1) -> pd.DataFrame:
    """Measure every weight matrix of a model, or of a folder with safetensors files, one row each.

    Columns: `weight`; `layer`, −1 outside the layers, and `role`, the module's own name, both read from the weight's
    name; `rows`, `columns`; the `SPECTRAL_MEASURES`; and `random`, the effective rank of a Gaussian matrix of the same
    shape (`marchenko_pastur_rank`). From a folder one matrix is in memory at a time, on `device` (default: a GPU if
    there is one). Of a stack of matrices, such as the experts of a layer, each has its row, `weight[0]`, `weight[1]`, …
    Embeddings are taken in, tied weights once; vectors are left out. An expanded model is refused: fuse it first. Of
    one that `device_map` spreads, one module at a time is read. `processes` measure a folder side by side, one matrix
    each; the main module of a script has to be guarded then, as for any `multiprocessing`.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> spectrum_table(model)[["weight", "rows", "columns"]].values.tolist()
    [['0.weight', 3, 4], ['1.weight', 2, 3]]
    """
    weights = matrices(source, device)
    if processes == 1:
        return pd.DataFrame([_measured(*each) for each in progress(weights.items(), "spectra")])
    if isinstance(source, nn.Module):
        raise ValueError(f"processes {processes}: need a folder, of which each process reads its own matrices")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:  # a fork loses torch's threads
        rows = pool.map(_measured, weights, weights.values())
        return pd.DataFrame(progress(rows, "spectra", total=len(weights)))


def update_table(
    base: Model, tuned: Model | Sequence[Model], *, device: str | torch.device | None = None
) -> pd.DataFrame:
    """Measure the update ΔW = tuned − base of every weight matrix, beside what rounding and chance would make of it.

    Columns as in `spectrum_table`, of ΔW in float64, and

    - `before`, `after`: effective rank of W and of W + ΔW; `by_chance`: of W plus a Gaussian matrix (drawn from a fixed
      seed) of the norm of ΔW: what moving as far in no particular direction would do;
    - `relative`: ‖ΔW‖_F / ‖W‖_F;
    - `noise_frobenius`, `noise_effective_rank`: of `rounding_noise` of W in the coarser of the two dtypes. An update
      not far above it in norm has the effective rank of noise: one of rank 64 can measure 128 from bf16 checkpoints;
    - `above_noise`: how many singular values of ΔW exceed the largest of that noise.

    An untouched matrix has an update of rank 0. Rows follow `base`; all must hold matrices of equal names and shapes.
    `tuned` may be several models, of which the column `tuned` has the number, from 0; `base` is then measured once.

    >>> base, *tuned = (torch.nn.Linear(3, 2) for _ in range(3))
    >>> update_table(base, tuned)[["tuned", "weight"]].values.tolist()
    [[0, 'weight'], [1, 'weight']]
    """
    several = isinstance(tuned, Sequence) and not isinstance(tuned, str)
    if several and not tuned:
        raise ValueError("tuned: need at least one model")
    before, models = matrices(base, device), [matrices(model, device) for model in (tuned if several else [tuned])]
    for after in models:
        check_versions(before, after)
    tables: list[list[dict[str, object]]] = [[] for _ in models]
    for name in progress(before, "updates"):
        old = _Start(name, before[name]())
        for number, (rows, after) in enumerate(zip(tables, models, strict=True)):
            rows.append(({"tuned": number} if several else {}) | old.update_row(after[name]()))
    return pd.DataFrame([row for rows in tables for row in rows])


class _Start:
    """A matrix of a base: what its updates are measured against, each once."""

    def __init__(self, name: str, matrix: Tensor) -> None:
        self.name, self.matrix = name, matrix
        self.effective_rank = _exp_entropy(_sigma(name, matrix))
        self.norm = torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
        self.noise = cache(lambda dtype: _sigma(name, rounding_noise(matrix, dtype)))
        draw = partial(torch.randn, matrix.shape, dtype=torch.float64)
        self.gaussian = cache(lambda: draw(generator=torch.Generator().manual_seed(0)))  # only if the matrix moved

    def update_row(self, new: Tensor) -> dict[str, object]:
        """The row of `update_table` for what has become of the matrix."""
        name, old = self.name, self.matrix
        if old.shape != new.shape:
            raise ValueError(f"{name}: {tuple(old.shape)} in base, {tuple(new.shape)} in tuned; need equal shapes")
        update = new.double() - old.double()
        (row, sigma), noise = _row(name, update), np.zeros(1)
        row["before"] = row["after"] = row["by_chance"] = self.effective_rank
        if sigma[0]:
            noise = self.noise(max(old.dtype, new.dtype, key=lambda dtype: torch.finfo(dtype).eps))
            row["after"] = _exp_entropy(_sigma(name, new))
            chance = self.gaussian() * (row["frobenius"] / self.gaussian().norm())
            row["by_chance"] = _exp_entropy(_sigma(name, old.double() + chance.to(old.device)))
        row["relative"] = row["frobenius"] / self.norm if self.norm else np.nan
        row["noise_frobenius"], row["noise_effective_rank"] = float(np.linalg.norm(noise)), _exp_entropy(noise)
        return row | {"above_noise": int((sigma > noise[0]).sum())}


def marchenko_pastur_rank(rows: int, columns: int) -> float:
    """Effective rank of a large matrix of this shape with independent entries of one variance.

    With m the smaller side and c = rows / columns or its inverse, at most 1, σ = √λ has the law of Marchenko & Pastur
    (1967): λ = 1 + c + 2√c cos θ, of weight (2/π) sin² θ / λ on θ ∈ (0, π). Then erank = m E[σ] exp(−E[σ ln σ] / E[σ]).
    Exact in the limit; a Gaussian matrix of 32×64 is within 1 %.

    >>> round(marchenko_pastur_rank(1024, 2816), 1), round(marchenko_pastur_rank(64, 64) / 64, 3)
    (971.7, 0.805)
    """
    small, c = min(rows, columns), min(rows, columns) / max(rows, columns)
    theta = (np.arange(4096) + 0.5) * np.pi / 4096  # the midpoint rule converges fast on a smooth periodic function
    eigenvalue = 1 + c + 2 * c**0.5 * np.cos(theta)
    weight, sigma = np.sin(theta) ** 2 / eigenvalue, np.sqrt(eigenvalue)
    weight /= weight.sum()
    mean = (weight * sigma).sum()
    return float(max(1.0, small * mean * np.exp(-(weight * sigma * np.log(sigma)).sum() / mean)))


def rounding_noise(
    matrix: Float[Tensor, "rows columns"], dtype: torch.dtype, *, seed: int = 0
) -> Float[Tensor, "rows columns"]:
    """Draw what two roundings of `matrix` to `dtype` can differ by, in float64.

    Each is even in ± half a unit in the last place of the entry, so that the noise has a standard deviation of
    ulp / √6; entries of zero have none.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand((2, *matrix.shape), generator=generator, dtype=torch.float64).to(matrix.device)
    mantissa, exponent = torch.frexp(matrix.double())  # 0.5 ≤ |mantissa| < 1
    ulp = torch.ldexp(torch.full_like(mantissa, torch.finfo(dtype).eps / 2), exponent) * (mantissa != 0)
    return (draws[0] - draws[1]) * ulp


def matrices(source: Model, device: str | torch.device | None = None) -> dict[str, Callable[[], Tensor]]:
    """What reads each matrix of a model or folder to `device`, by name; before that only headers of files are read.

    A tensor of three dimensions, such as the experts of a layer, is a stack of matrices and gives `name[0]`, `name[1]`,
    …, unless they would be vectors; anything else is left out. The default device is a GPU if there is one.

    >>> {name: tuple(read().shape) for name, read in matrices(nn.Linear(4, 3)).items()}
    {'weight': (3, 4)}
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(source, nn.Module):
        tensors = {name: (weight.shape, weight.read) for name, weight in stored_weights(Path(source)).items()}
    elif is_expanded(source):
        raise ValueError("the model is expanded: its weights lie in parts; need fuse(model) first")
    else:
        tied = getattr(source, "all_tied_weights_keys", {})  # of which an offloaded model has two parameters
        here = {name: p for name, p in source.named_parameters() if not (p.is_meta and name in tied)}
        tensors = {name: (parameter.shape, partial(_values, source, name)) for name, parameter in here.items()}
    weights: dict[str, Callable[[], Tensor]] = {}
    for name, (shape, read) in tensors.items():
        if len(shape) == 2 and min(shape):
            weights[name] = partial(_read, read, ..., device)
        elif len(shape) == 3 and min(shape[1:]) > 1:
            weights |= {f"{name}[{index}]": partial(_read, read, index, device) for index in range(shape[0])}
    if not weights:
        raise ValueError(f"{source if isinstance(source, str | Path) else type(source).__name__} has no weight matrix")
    return weights


def _values(model: nn.Module, name: str, part: object) -> Tensor:
    """A part of a parameter, wherever `device_map` keeps it."""
    parameter = model.get_parameter(name)
    if parameter.is_meta:
        from accelerate.utils import align_module_device

        with align_module_device(model.get_submodule(name.rpartition(".")[0])):
            parameter = model.get_parameter(name)
    return parameter.detach()[part]


def _read(read: Callable[[object], Tensor], part: object, device: str | torch.device) -> Tensor:
    return read(part).to(device)


def _sigma(name: str, matrix: Tensor) -> np.ndarray:
    if not matrix.is_floating_point() or matrix.dtype.itemsize == 1:
        raise ValueError(f"{name} is {matrix.dtype}: need 16 bits or more, not packed or quantised values")
    try:
        return singular_values(matrix)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _measured(name: str, read: Callable[[], Tensor]) -> dict[str, object]:
    return _row(name, read())[0]


def _row(name: str, matrix: Tensor) -> tuple[dict[str, object], np.ndarray]:
    """A row of a table, and the singular values that it tells of."""
    (layer, role), (rows, columns) = layer_and_role(name), matrix.shape
    row = {"weight": name, "layer": layer, "role": role, "rows": rows, "columns": columns}
    sigma = _sigma(name, matrix)
    return row | measures(sigma) | {"random": marchenko_pastur_rank(rows, columns)}, sigma


def layer_and_role(name: str) -> tuple[int, str]:
    """Read a weight's name: the first number in it, −1 where there is none, and its last word but "weight".

    >>> layer_and_role("model.layers.3.mlp.experts.up_proj[7]"), layer_and_role("lm_head.weight")
    ((3, 'up_proj'), (-1, 'lm_head'))
    """
    words = name.partition("[")[0].removesuffix(".weight").split(".")
    return next((int(word) for word in words[:-1] if word.isdecimal()), -1), words[-1]
