"""Every test runs on 8 fake CPU devices.

Shape annotations are checked, and there is no silent rank promotion.
"""

import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, and most programs are compiled by more than one test:
# they share a folder of programs, with the other workers and with the processes that tests start.
# Nothing stays in the home of who runs it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="unifluid_programs_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import jaxtyping
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of a small test's time is compilation; the programs themselves run in milliseconds either
# way.
jax.config.update("jax_disable_most_optimizations", True)
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


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
