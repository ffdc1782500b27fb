"""The benchmark against PyTorch, as far as it goes without PyTorch."""

import jax
import numpy as np
import pytest

from benchmarks import against_torch
from unifluid_jax import planning
from unifluid_jax.errors import UserError
from unifluid_jax.parts import assemble, blueprint
from unifluid_jax.sequence import Modality


def test_its_rows_are_such_as_the_trainer_reads():
    config = against_torch.config_of(4)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    where = jax.NamedSharding(mesh, jax.P())
    wanted = planning.abstract_batch(blueprint(config), where)
    layout = assemble(config).sequencer.layout
    batch, plain = against_torch.make_batch(layout, 4)
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (x.shape, x.dtype) for n, x in wanted.items()
    }
    # Every image token is asked for once, and all but the last are fed.
    asked, fed = batch["target_position"][0], batch["content_position"][0]
    assert (batch["image_weight"][0] > 0).tolist() == (asked >= 0).tolist()
    np.testing.assert_array_equal(asked[asked >= 0], plain["order"][0])
    np.testing.assert_array_equal(fed[fed >= 0], plain["order"][0][:-1])
    np.testing.assert_array_equal(fed >= 0, batch["modality"][0] == Modality.LATENT)
    told = batch["text_weight"][0] > 0
    np.testing.assert_array_equal(batch["text_target"][0][told], plain["tokens"][0][1:15])


def test_a_missing_pytorch_is_said():
    with pytest.raises(UserError, match="no Python with PyTorch at nowhere/python"):
        against_torch.Theirs("nowhere/python")
