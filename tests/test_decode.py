"""Cached passes against full ones, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding import (
    LAYOUTS,
    PROMPTS,
    N,
    full,
    latents,
    make_model,
    make_params,
    order,
    sequences,
)
from unifluid_jax import decode

CASES = [(LAYOUTS["causal"], "generate"), (LAYOUTS["bidirectional"], "edit")]
cases = pytest.mark.parametrize("layout, task", CASES, ids=["causal", "bidirectional"])


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def params(model):
    return make_params(model)


@cases
def test_the_cache_gives_the_hidden_states_of_the_full_pass(model, params, layout, task):
    targets = np.stack([latents(10 + i).mean for i in range(len(PROMPTS))])
    rows = sequences(layout, task, targets)
    expected = full(model, params, rows)
    starts = [len(row) - N for row in rows]

    @jax.jit
    def run(params, prefix):
        bound = model.bind(params)
        hidden, state = decode.prefill(bound, prefix, N - 1)
        found = [hidden]
        for i in range(N - 1):
            cells = np.stack([order(row) for row in range(len(rows))])
            fed = targets[np.arange(len(rows)), cells[:, i]][:, None]
            x = bound.embed_content(jnp.asarray(fed), jnp.asarray(cells[:, i : i + 1]))
            x += bound.embed_target(jnp.asarray(cells[:, i + 1 : i + 2]))
            hidden, state = decode.feed(bound, x[:, 0], state)
            found.append(hidden)
        return jnp.stack(found, axis=1)

    found = run(params, decode.stack(sequences(layout, task), 20))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(found[row], expected[row, start : start + N], atol=1e-4)


def test_a_prefix_too_long_for_its_rows_is_refused():
    with pytest.raises(ValueError, match="7 positions for rows of 6"):
        decode.stack(sequences(LAYOUTS["causal"], "generate"), 6)
