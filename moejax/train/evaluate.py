"""The loss on text that the model was not trained on."""

from collections.abc import Callable, Iterable
from typing import Any

from moejax.data.batch import Batch
from moejax.model.sharded import Sharded, on_mesh


def validation_loss(sharded: Sharded, evaluation: Callable[..., Any], weights: dict[str, Any],
                    batches: Iterable[Batch]) -> float:
    """Mean over all targets of the batches, in nats per token."""
    loss = tokens = 0.0
    for batch in batches:
        more, count = evaluation(weights, on_mesh(sharded.mesh, batch))
        loss, tokens = loss + float(more), tokens + float(count)
    return loss / tokens
