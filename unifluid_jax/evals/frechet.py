"""Frechet distance between two sets of features, as Gaussians.

Which features they are decides what it means: it is the FID only on those of Inception, which this
project does not use.
"""

import numpy as np
from jaxtyping import Float


def distance(x_ND: Float[np.ndarray, "N D"], y_MD: Float[np.ndarray, "M D"]) -> float:
    """`|m_x - m_y|^2 + trace(S_x + S_y - 2 (S_x S_y)^(1/2))`, in float64 (Heusel et al. 2017).

    It depends on the numbers of features: compare sets of one size. With fewer features than dims
    the covariances are singular, which the formula bears.

    Raises:
        ValueError: a set has fewer than two features.
    """
    if min(len(x_ND), len(y_MD)) < 2:
        raise ValueError(f"a covariance needs two features, got {len(x_ND)} and {len(y_MD)}")
    x_ND, y_MD = np.asarray(x_ND, np.float64), np.asarray(y_MD, np.float64)
    cov_x, cov_y = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (x_ND, y_MD))
    # S_x S_y has the eigenvalues of the symmetric S_x^(1/2) S_y S_x^(1/2).
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(np.maximum(values, 0))[None] @ vectors.T
    mixed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_y @ root), 0)).sum()
    apart = np.square(x_ND.mean(0) - y_MD.mean(0)).sum()
    return float(max(apart + np.trace(cov_x) + np.trace(cov_y) - 2 * mixed, 0.0))
