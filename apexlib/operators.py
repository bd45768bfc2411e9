"""Expansion operators: small k × k matrices M that map k source rows to k target rows (APEX, arXiv:2505.24241).

The method's own is a Monarch matrix, two block-diagonal factors around a fixed permutation (Dao et al. 2022,
arXiv:2204.00595); diagonal, low-rank and dense M serve its ablations. M is zero at the start, exactly, and trains from
there. For attention, k is the number of selected heads times `head_dim`. A product from the right is a transpose away:
W Mᵀ = (M Wᵀ)ᵀ, that is `operator(weight.T).T`.

A new operator is a class with its `factors` and its product, and a row of `OPERATORS`; its settings, its count of
parameters and its start follow from these.
"""

from contextlib import AbstractContextManager, nullcontext
from math import isqrt, prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

Factors = dict[str, tuple[int, ...] | None]  # shapes by name; None: this M does without


class Operator(nn.Module):
    """A trainable k × k matrix M, known by its product with rows; its parameters are float32, whatever the model.

    The factors of M are drawn uniformly, with bound fan_in^(−`decline`), but the last, which is zero. They are drawn on
    the generator's device and then moved, so that a seed on the CPU gives the same operator on every device.
    """

    decline = 0.5  # Kaiming, as `nn.Linear` has it

    def __init__(
        self, k: int, *, generator: Generator | None = None, device: torch.device | str | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.k = k
        *drawn, (last, zero) = self.factors(_at_least_one(k), **options).items()
        for name, shape in drawn:
            self.register_parameter(name, None if shape is None else _drawn(shape, self.decline, generator, device))
        self.register_parameter(last, nn.Parameter(torch.zeros(zero, dtype=torch.float32, device=device)))

    @classmethod
    def factors(cls, k: int) -> Factors:
        """Name the factors of M in the order in which they are applied, with their shapes."""
        raise NotImplementedError

    @classmethod
    def count(cls, k: int, **options: Any) -> int:
        """Count the parameters of M for `k` rows without making it."""
        return sum(prod(shape) for shape in cls.factors(_at_least_one(k), **options).values() if shape is not None)

    def forward(self, rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Compute M @ rows in the parameters' dtype, under autocast too.

        Rows of another dtype are cast to it: M composes weights, once per step, and bfloat16 would round them.
        """
        if rows.shape[0] != self.k:
            raise ValueError(f"{type(self).__name__} maps {self.k} rows, got {rows.shape[0]}")
        factors = self._parameters.values()
        with without_autocast(rows.device):
            return self.product(rows.to(next(self.parameters()).dtype), *factors)

    def dense(self) -> Float[Tensor, "k k"]:
        """Write M out in full."""
        parameter = next(self.parameters())
        return self(torch.eye(self.k, dtype=parameter.dtype, device=parameter.device))

    @staticmethod
    def product(rows: Float[Tensor, "k d"], *factors: Tensor | None) -> Float[Tensor, "k d"]:
        """Multiply rows by the M of these factors, which are in the order of `factors`."""
        raise NotImplementedError

    @classmethod
    def gradients(cls, grad: Float[Tensor, "k d"], rows: Float[Tensor, "k d"], *factors: Tensor | None) -> tuple:
        """Gradients of `product` by the rows and by each factor, from nothing but these."""
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            given = [None if each is None else each.view_as(each).requires_grad_() for each in (rows, *factors)]
            leaves = [each for each in given if each is not None]
            found = iter(torch.autograd.grad(cls.product(*given), leaves, grad, create_graph=twice))
        return tuple(None if each is None else next(found) for each in given)

    def extra_repr(self) -> str:
        return f"k={self.k}, parameters={sum(parameter.numel() for parameter in self.parameters())}"


class MonarchOperator(Operator):
    """M = Πᵀ L₂ Π L₁ with n blocks of m × m in L₁ (`first`), m blocks of n × n in L₂ (`second`); see `monarch_blocks`.

    If n·m > k, the rows are padded with zeros to n·m and the product is cut off after row k. If m = 1, there is no L₁:
    L₂ alone is dense.

    >>> operator = MonarchOperator(6)
    >>> operator.first.shape, operator.second.shape
    (torch.Size([2, 3, 3]), torch.Size([3, 2, 2]))
    >>> operator.dense().count_nonzero().item()  # L₂ is zero at the start
    0
    """

    @classmethod
    def factors(cls, k: int) -> Factors:
        n, m = monarch_blocks(k)
        return {"first": (n, m, m) if m > 1 else None, "second": (m, n, n)}

    @staticmethod
    def product(rows: Float[Tensor, "k d"], first: Tensor | None, second: Tensor) -> Float[Tensor, "k d"]:
        blocks = _blocks(rows, second)
        blocks = blocks if first is None else torch.bmm(first, blocks)
        # Π hands row r of every L₁ block to L₂ block r, Πᵀ hands it back
        return torch.bmm(second, blocks.transpose(0, 1)).transpose(0, 1).flatten(0, 1)[: len(rows)]

    @classmethod
    def gradients(cls, grad: Tensor, rows: Tensor, first: Tensor | None, second: Tensor) -> tuple[Tensor | None, ...]:
        blocks, by_out = _blocks(rows, second), _blocks(grad, second).transpose(0, 1)
        between = blocks if first is None else torch.bmm(first, blocks)
        by_second = torch.bmm(by_out, between.transpose(0, 1).mT)
        by_between = torch.bmm(second.mT, by_out).transpose(0, 1)
        by_first = None if first is None else torch.bmm(by_between, blocks.mT)
        by_blocks = by_between if first is None else torch.bmm(first.mT, by_between)
        return by_blocks.flatten(0, 1)[: len(rows)], by_first, by_second


class ReleaseMonarchOperator(MonarchOperator):
    """The Monarch operator as the authors' release draws it: with bound 1/m for blocks of m columns, √m smaller."""

    decline = 1.0


class DiagonalOperator(Operator):
    """M = diag(`diagonal`): target row i reads source row i only."""

    @classmethod
    def factors(cls, k: int) -> Factors:
        return {"diagonal": (k,)}

    @staticmethod
    def product(rows: Float[Tensor, "k d"], diagonal: Tensor) -> Float[Tensor, "k d"]:
        return diagonal[:, None] * rows


class LowRankOperator(Operator):
    """M = B A with A (`down`) of `rank` rows and B (`up`) of `rank` columns, B zero at the start.

    By default `rank` is the largest that costs no more than the Monarch operator, so that an ablation compares forms at
    an equal budget; it is at least 1, which for k = 1 is one parameter more than dense.
    """

    @classmethod
    def factors(cls, k: int, rank: int | None = None) -> Factors:
        if rank is None:
            rank = max(1, MonarchOperator.count(k) // (2 * k))
        if not 1 <= rank <= k:
            raise ValueError(f"a low-rank operator for k={k} rows needs a rank from 1 to {k}, got {rank}")
        return {"down": (rank, k), "up": (k, rank)}

    @staticmethod
    def product(rows: Float[Tensor, "k d"], down: Tensor, up: Tensor) -> Float[Tensor, "k d"]:
        return up @ (down @ rows)


class DenseOperator(Operator):
    """M = `matrix`, every target row reads every source row, at k² parameters."""

    @classmethod
    def factors(cls, k: int) -> Factors:
        return {"matrix": (k, k)}

    @staticmethod
    def product(rows: Float[Tensor, "k d"], matrix: Tensor) -> Float[Tensor, "k d"]:
        return matrix @ rows


OPERATORS: dict[str, type[Operator]] = {
    "monarch": MonarchOperator,
    "monarch_release": ReleaseMonarchOperator,
    "diagonal": DiagonalOperator,
    "low_rank": LowRankOperator,
    "dense": DenseOperator,
}


def make_operator(kind: str, k: int, **options: Any) -> Operator:
    """Make the operator of that kind for `k` rows; `generator`, `device` and, for "low_rank", `rank` are its options.

    >>> make_operator("diagonal", 5)
    DiagonalOperator(k=5, parameters=5)
    """
    return operator_class(kind)(k, **options)


def _blocks(rows: Float[Tensor, "k d"], second: Float[Tensor, "m n n"]) -> Float[Tensor, "n m d"]:
    m, n, _ = second.shape
    padding = n * m - len(rows)  # padding by zero rows would still copy
    return (nn.functional.pad(rows, (0, 0, 0, padding)) if padding else rows).view(n, m, -1)


def monarch_blocks(k: int) -> tuple[int, int]:
    """Choose n and m, n·m ≥ k, for a Monarch matrix with n blocks of m × m and m blocks of n × n.

    n is the divisor of k nearest √k and m = k / n, if n ≥ √k / 2: then M costs k·(n + m), from 2·k·√k to 2.5·k·√k
    parameters. A k without such a divisor (a prime, twice a prime) is padded to the n·m that costs least. Where even
    that would cost more than a dense matrix (k = 1, 2, 3, 5), the answer is (k, 1): one dense block.

    >>> [monarch_blocks(k) for k in (2064, 768, 1031, 34, 3)]
    [(43, 48), (24, 32), (28, 37), (5, 7), (3, 1)]
    """
    root = isqrt(k)
    divisor = max(n for n in range(1, root + 1) if k % n == 0)
    n, m = divisor, k // divisor
    if 4 * n * n < k:
        padded = ((n, -(-k // n)) for n in range(1, root + 1))
        n, m = min(padded, key=lambda blocks: prod(blocks) * sum(blocks))
    return (n, m) if n * m * (n + m) <= k * k else (k, 1)


def _at_least_one(k: int) -> int:
    if k < 1:
        raise ValueError(f"an operator needs at least one row, got k={k}")
    return k


def operator_class(kind: str) -> type[Operator]:
    """Look a kind up in `OPERATORS`."""
    if kind not in OPERATORS:
        raise ValueError(f"unknown operator {kind!r}; known: {', '.join(OPERATORS)}")
    return OPERATORS[kind]


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Compute in the dtypes given. Meta has no autocast; torch 2.11 can't trace the function that tells so."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _drawn(
    shape: tuple[int, ...], decline: float, generator: Generator | None, device: torch.device | str | None
) -> nn.Parameter:
    drawn = torch.empty(shape, dtype=torch.float32, device=generator.device if generator else "cpu")
    bound = shape[-1] ** -decline  # `nn.init` would take the blocks for a kernel
    drawn.uniform_(-bound, bound, generator=generator)
    return nn.Parameter(drawn.to(device or torch.get_default_device()))
