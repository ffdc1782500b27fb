"""Frechet distance against closed forms and a general matrix square root."""

import numpy as np
import pytest
from scipy import linalg

from unifluid_jax.evals import frechet


def test_equal_sets_have_no_distance_and_a_shift_has_its_square():
    x = np.random.default_rng(0).normal(size=(50, 4))
    assert frechet.distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet.distance(x, x + np.array([3, 0, 0, 4])) == pytest.approx(25)
    one = x[:, :1]
    assert frechet.distance(one, 3 * one - 2 * one.mean()) == pytest.approx(4 * one.var(ddof=1))


def test_it_is_the_formula_with_a_general_square_root():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5))
    y = rng.normal(size=(90, 5)) @ rng.normal(size=(5, 5)) + 1
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(a @ b).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * root)
    assert frechet.distance(x, y) == pytest.approx(expected)
    assert frechet.distance(y, x) == pytest.approx(expected)


def test_fewer_features_than_dims_are_borne_and_one_is_not():
    rng = np.random.default_rng(2)
    assert np.isfinite(frechet.distance(rng.normal(size=(3, 9)), rng.normal(size=(4, 9))))
    with pytest.raises(ValueError, match="needs two features, got 1 and 4"):
        frechet.distance(np.ones((1, 2)), np.ones((4, 2)))
