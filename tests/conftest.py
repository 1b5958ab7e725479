"""Eight fake CPU devices, checked annotations, and no silent promotion of types or ranks in our own arithmetic."""

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

install_import_hook("moejax", "beartype.beartype")


@pytest.fixture(autouse=True)
def strict(request: pytest.FixtureRequest):
    """In the tests of the model and what is below it; optax, which training calls, promotes its step counts."""
    if not {"model", "parallel"} & set(request.path.parts):
        yield
    else:
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            yield
