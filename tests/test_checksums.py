import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "uint8", "bool"])
def test_a_checksum_tells_bits_and_places(dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (3, 4, 5)).astype(jnp.dtype(dtype))
    sums = {int(checksums.of(x))}
    for i in range(x.size):
        bits = x.copy().reshape(-1).view(np.uint8)
        bits[i * x.dtype.itemsize] ^= 1
        sums.add(int(checksums.of(bits.view(x.dtype).reshape(x.shape))))
    sums.add(int(checksums.of(x[::-1].copy())))
    assert len(sums) == x.size + 2
    mesh = jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    cut = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "a")))
    assert int(checksums.of(cut)) == int(checksums.of(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 4, 5), (1100, 1000)])
def test_the_host_and_the_devices_agree_also_on_parts(dtype, shape):
    x = np.random.default_rng(0).integers(0, 2, shape).astype(jnp.dtype(dtype))
    wanted = int(checksums.of(x))
    assert checksums.part(x) == wanted
    flat, cuts = x.reshape(-1), (0, x.size // 3, x.size // 2, x.size)
    parts = [checksums.part(flat[a:b], a) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert sum(parts[::-1]) % 2**32 == wanted


@pytest.mark.parametrize("shape", [(5, 6, 8), (16, 7), (40,)])
@pytest.mark.parametrize("block", [1, 20, 24, 100, 1000])
def test_blocks_of_shards_of_any_mesh_make_the_same_sum(monkeypatch, shape, block):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    wanted = checksums.part(x)
    monkeypatch.setattr(checksums, "_BLOCK", block)
    checksums._of.clear_cache()
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), (jax.sharding.AxisType.Auto,) * 3)
    last, first = len(shape) - 1, 8 if shape[0] % 8 == 0 else 1
    specs = [jax.P(), jax.P(*[None] * last, ("b", "a"))]
    specs += [jax.P(("c", "b", "a"))] if first == 8 else []
    specs += [jax.P(None, "c", "a")] if last == 2 else []
    for spec in specs:
        if last == 1 and spec and spec[-1] == ("b", "a"):
            continue  # 7 columns do not divide
        cut = jax.device_put(x, jax.NamedSharding(mesh, spec))
        assert int(checksums.of(cut)) == wanted, spec
    assert int(checksums.of(jnp.asarray(x))) == wanted
    checksums._of.clear_cache()


def test_places_count_modulo_two_to_the_32():
    """Beyond arrays that a test can hold: places wrap as the sums do."""
    x = np.arange(1, 9, dtype=np.uint32)
    assert (
        checksums.part(x, 2**32 - 3)
        == (checksums.part(x[:3], 2**32 - 3) + checksums.part(x[3:], 0)) % 2**32
    )


def test_what_was_widened_is_compared_as_it_was():
    x = jnp.linspace(-3, 3, 100).astype(jnp.bfloat16)
    saved = checksums.leaves({"a": {"x": x, "y": x[:4]}})
    assert saved["a/y"][0] == "bfloat16[4]"
    wide = {"a": {"x": x.astype(jnp.float32), "y": x[:4]}}
    assert checksums.differing(wide, saved) == []
    wide["a"]["x"] = wide["a"]["x"].at[5].add(0.1)
    assert checksums.differing(wide, saved) == ["a/x"]
