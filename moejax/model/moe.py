"""The feed-forward half of a block with experts: route, dispatch, add the shared experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from moejax import config as configs
from moejax.model.dispatch import DISPATCHERS, Experts
from moejax.model.layers import MLP, Pass, Stream, activation, plus
from moejax.model.router import Losses, Routing, capacity, route
from moejax.model.weights import Bias, Weights, use
from moejax.parallel import collectives


class MoELayer(nnx.Module):
    def __init__(self, w: Weights, model: configs.Model):
        moe = model.moe
        experts = w.sized(hidden=moe.hidden)
        self.router, self.bias = w("embed -> choice"), w("choice", 0.0, Bias)
        self.up, self.down = experts("expert: embed -> gate hidden"), experts("expert: hidden -> embed")
        self.up_bias, self.down_bias = (experts(axes, 0.0) if "experts" in model.biases else None
                                        for axes in ("expert gate hidden", "expert norm"))
        self.router_bias = w("choice", 0.0) if "router" in model.biases else None
        self.shared = MLP(w.sized(hidden=moe.shared), model) if moe.shared else None
        self.shared_gate = w("embed -> one") if moe.shared_gate else None
        self.moe, self.activation = moe, activation(model)

    def __call__(self, x: Stream, run: Pass) -> tuple[Stream, tuple[Routing, Losses]]:
        inside = collectives.enter(x, run.sequence)
        # Unless the sequence is split, routers see x before it is marked as work for every tensor shard: the decision
        # and its gradient are computed alike everywhere, without communication.
        seen = inside if run.sequence else x
        batch, tokens, size = seen.shape
        group = min(self.moe.group or tokens, tokens) if run.drop else tokens
        routing, losses, seats = self.decide(seen.reshape(-1, group, size), run)
        biases = None if self.up_bias is None else (
            self.up_bias[...].astype(run.dtype), collectives.once(self.down_bias[...].astype(run.dtype)))
        experts = Experts(use(self.up, run.dtype), use(self.down, run.dtype), self.activation, biases)
        y = DISPATCHERS[self.moe.dispatcher](inside.reshape(-1, group, size), routing, seats, experts)
        y = y.reshape(batch, tokens, size)
        shared = None if self.shared is None else self.shared(inside, run)
        if self.shared_gate is not None:
            gate = jnp.einsum("btd,dz->btz", inside, use(self.shared_gate, run.dtype))
            shared = shared * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(run.dtype)
        y = y if shared is None else y + shared
        per_sequence = Routing(*(part.reshape(batch, tokens, -1) for part in routing))
        return collectives.leave(y, run.sequence), (per_sequence, losses)

    def decide(self, x: Float[Array, "R M D"], run: Pass) -> tuple[Routing, Losses, int]:
        h = x.astype(jnp.float32)
        if run.training and self.moe.jitter:
            h = h * self.noise(h, run)
        logits = plus(jnp.einsum("rmd,de->rme", h, use(self.router, jnp.float32)), self.router_bias)
        seats = capacity(self.moe, x.shape[1], run.training) if run.drop else x.shape[1]
        routing, losses = route(logits, self.bias[...], self.moe, seats)
        return routing, losses, seats

    def noise(self, h: Float[Array, "R M D"], run: Pass) -> Float[Array, "R M D"]:
        """Switch's input jitter (arXiv 2101.03961 section 2.3), drawn per sample so that no layout changes it."""
        groups = h.shape[0] // run.rows.shape[0]
        keys = jax.vmap(lambda row: jax.random.fold_in(run.key, row))(run.rows)
        low, high = 1 - self.moe.jitter, 1 + self.moe.jitter
        draw = jax.vmap(lambda key: jax.random.uniform(key, (groups * h.shape[1], h.shape[2]), jnp.float32, low, high))
        return draw(keys).reshape(h.shape)
