"""What a language model must beat to be one: the loss of predicting text from counts of tokens alone."""

import numpy as np
import torch
from jaxtyping import Int
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor


def unigram_loss(train: Tensor, test: Tensor, vocabulary: int) -> float:
    """Loss, in nats per token, of predicting each token of `test` from its frequency in `train` (add-one smoothed)."""
    counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[test.flatten()].mean().item()


def ngram_loss(
    train: Int[np.ndarray, " tokens"], test: Int[np.ndarray, "blocks length"], vocabulary: int, *, order: int = 3
) -> float:
    """Loss, in nats per token, of an interpolated n-gram model, n being `order`, from 1 to 3.

    The model of a context h = (b, c) mixes its counts with the model of the shorter context (c), after Witten & Bell
    (IEEE Trans. Inf. Theory 1991): p(w | h) = (count(h w) + T(h) p(w | c)) / (count(h) + T(h)), T(h) being the number
    of different words seen after h; below it stand the smoothed frequencies of `unigram_loss`. Nothing is fitted.
    The first token of every block of `test` is context only, as it is for a model.
    """
    if not 1 <= order <= 3 or vocabulary > 2**20:
        raise ValueError(f"order={order}, vocabulary={vocabulary}: need order 1 to 3, at most {2**20} tokens")
    train, test = np.asarray(train, dtype=np.int64), np.asarray(test, dtype=np.int64)
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    p = (counts / counts.sum())[test[:, 1:]]
    for n in range(2, min(order, test.shape[1]) + 1):
        powers = vocabulary ** np.arange(n)[::-1]  # number every run of n tokens
        seen, times = np.unique(sliding_window_view(train, n) @ powers, return_counts=True)
        contexts, first, kinds = np.unique(seen // vocabulary, return_index=True, return_counts=True)
        asked = sliding_window_view(test, n, axis=1) @ powers
        count = _look_up(asked, seen, times)
        total = _look_up(asked // vocabulary, contexts, np.add.reduceat(times, first))
        different = _look_up(asked // vocabulary, contexts, kinds)
        shorter = p[:, n - 2 :]
        p[:, n - 2 :] = np.where(total > 0, (count + different * shorter) / np.maximum(total + different, 1), shorter)
    return float(-np.log(p).mean())


def _look_up(keys: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each key, 0 for one that is not known (`known` is sorted)."""
    index = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return np.where(known[index] == keys, values[index], 0)
