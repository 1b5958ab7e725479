"""Eight fake CPU devices, checked annotations, and no silent promotion of types or ranks in our own arithmetic."""

import gc
import os

import jax
import pytest
from jaxtyping import install_import_hook

# Most of the time of these tests is compilation, which this halves twice (once where the emitters cannot be chosen);
# the numbers are the same up to rounding.  A test is one program after another: no program needs all cores.
FAST = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    " --xla_llvm_disable_expensive_passes=true") * (jax.__version_info__ < (0, 11))
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
assert jax.device_count() == 8  # from now on no config's fake_devices can make it fewer

# Tracing makes and keeps so many objects that looking for cycles as often as usual would take a twelfth of the time.
gc.freeze()
gc.set_threshold(200_000, 20, 100)

# With the numeric tower an int is a float (PEP 484), as in `lr=1`.
install_import_hook("moejax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


# Files that take minutes begin first, so that at the end no worker waits for another.
LONG = ("test_vision.py", "test_survival.py", "test_pipeline.py", "test_readme.py", "test_processes.py",
        "test_sharded.py", "test_count.py", "test_budget.py", "test_images.py")


def pytest_collection_modifyitems(items: list[pytest.Item]):
    items.sort(key=lambda item: (item.path.name not in LONG, item.path.parent.name != "train"))


@pytest.fixture(autouse=True)
def strict(request: pytest.FixtureRequest):
    """In the tests of the model and what is below it; optax, which training calls, promotes its step counts."""
    if not {"model", "parallel"} & set(request.path.parts):
        yield
    else:
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            yield
