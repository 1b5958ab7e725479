"""moejax: a mixture-of-experts transformer that trains, resumes and serves with the same numbers on any mesh."""

from typing import TYPE_CHECKING, Any

from moejax.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from moejax.api import Model, generate, load

__version__ = "0.1.0"
__all__ = ["Config", "ConfigError", "Model", "generate", "load", "load_config"]


def __getattr__(name: str) -> Any:
    """`load`, `generate` and `Model` bring in jax, so they are imported when first used."""
    if name not in ("load", "generate", "Model"):
        raise AttributeError(f"module 'moejax' has no attribute {name!r}")
    from moejax import api

    return getattr(api, name)
