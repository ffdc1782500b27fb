"""UniFluid in JAX.

    import unifluid_jax

    m = unifluid_jax.load("runs/quickstart")
    m.generate("a red circle", n=4)[0].save("circle.png")

See `unifluid_jax.inference.Model` for all it can do.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unifluid_jax.inference import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    # On demand: `unifluid --help` and the trainer's workers need none of it.
    if name in __all__:
        from unifluid_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
