"""Counts of tokens as language models, against their literal definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apexlib.text.references import ngram_loss, unigram_loss


def test_unigram_loss_is_the_entropy_on_its_own_text():
    tokens = torch.randint(0, 7, (20_000,), generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens).double() / len(tokens)
    assert unigram_loss(tokens, tokens, 7) == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-4)


def test_losses_of_texts_counted_by_hand():
    assert unigram_loss(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1]), 2) == pytest.approx(-math.log(8 / 36) / 2)
    assert ngram_loss(np.array([0, 1, 0, 1, 0]), np.array([[0, 1, 0]]), 2, order=2) == pytest.approx(0.183, abs=5e-4)


def literal_ngram(train, block, position, order, vocabulary):
    """p(w | h) of Witten & Bell by counting, with the longest context the block gives."""

    def p(word, context):
        if not context:
            return (train.count(word) + 1) / (len(train) + vocabulary)
        n = len(context)
        after = [train[i + n] for i in range(len(train) - n) if train[i : i + n] == context]
        kinds = len(set(after))
        shorter = p(word, context[1:])
        return (after.count(word) + kinds * shorter) / (len(after) + kinds) if after else shorter

    return p(block[position], block[max(0, position - order + 1) : position])


@given(
    st.lists(st.integers(0, 3), min_size=3, max_size=30),
    st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_ngram_loss_is_the_literal_count(train, blocks, order):
    logs = [math.log(literal_ngram(train, block, position, order, 4)) for block in blocks for position in range(1, 4)]
    found = ngram_loss(np.array(train), np.array(blocks), 4, order=order)
    assert found == pytest.approx(-np.mean(logs), rel=1e-9)


def test_an_ngram_model_is_a_distribution():
    train = np.random.default_rng(0).integers(0, 5, 40)
    chances = [math.exp(-ngram_loss(train, np.array([[1, 2, word]]), 5)) for word in range(5)]
    first = math.exp(-ngram_loss(train, np.array([[1, 2]]), 5))  # each chance is √(p(2 | 1) p(word | 1, 2))
    assert sum(chance**2 / first for chance in chances) == pytest.approx(1)
