"""What `unifluid benchmark first_picture` counts as overhead."""

import types

import pytest

from benchmarks import first_picture
from tests import worlds
from unifluid_jax import decode_image, sharding
from unifluid_jax.image_tokenizer import ImageTokenizer


def test_overhead_is_what_passes_outside_of_the_programs(tmp_path, monkeypatch):
    model, now = worlds.make_model(tmp_path), [0]
    monkeypatch.setattr(first_picture, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds, owner, name):
        function = getattr(owner, name)

        def call(*arguments, **named):
            now[0] += seconds
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    takes(1, model, "requests")
    takes(10, decode_image, "images")
    takes(100, ImageTokenizer, "pictures")
    takes(1000, sharding, "fetch")  # within `pictures`, and nowhere else
    assert first_picture.overhead(model, 1, 2) == pytest.approx((1111, 1))
