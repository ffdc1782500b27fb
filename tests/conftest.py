"""Every test runs on 8 fake CPU devices.

Shape annotations are checked, and there is no silent rank promotion.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of a small test's time is compilation; the programs themselves run in milliseconds either
# way.
jax.config.update("jax_disable_most_optimizations", True)
# Nothing of a test stays in the home of who runs it.
jax.config.update("jax_enable_compilation_cache", False)
# Production runs unchecked; this hook is the one switch.
jaxtyping.install_import_hook("unifluid_jax", "beartype.beartype")

# Programs have flags of the same names; a test process may import several of them.
_set_flag = flags.FlagValues.__setitem__


def _set_shared_flag(values, name, flag):
    flag.allow_override = True
    _set_flag(values, name, flag)


flags.FlagValues.__setitem__ = _set_shared_flag


@pytest.fixture
def key():
    return jax.random.key(0)
