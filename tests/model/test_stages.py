"""Which layers lie on which stage, and the way of their weights there and back."""

import itertools
import math
from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.config import Config, Mesh, Model, MoE
from moejax.model import transformer, weights
from moejax.model.sharded import Sharded
from moejax.model.stages import Stages, layer_counts, places, prefix_of, shortest_line
from moejax.parallel import axes, collectives
from moejax.parallel.mesh import make_mesh

SIZES = dict(d_model=12, heads=4, kv_heads=2, head_dim=6, hidden=10, vocab=28,
             moe=MoE(experts=3, hidden=14, router="sigmoid"))


@cache
def make(pattern: str, mesh: Mesh) -> Sharded:
    model = Model(layers=len(pattern), pattern=pattern, **SIZES)
    return Sharded(Config(model=model, mesh=mesh), make_mesh(mesh, jax.devices()[: mesh.devices()]))


def numbers(pattern: str, **mesh) -> list:
    model = Model(layers=len(pattern), pattern=pattern, **SIZES)
    return Stages(Config(model=model, mesh=Mesh(**mesh))).numbers.tolist()


@pytest.mark.parametrize(("parts", "line"), [
    (["M"], "M"),
    (["MM", "MM"], "MM"),
    (["MM", "M", "MMM"], "MMM"),
    (["DM", "DM"], "DM"),
    (["DDM", "MMM"], "DDMMM"),
    (["D", "M"], "DM"),
    (["D", "", "D"], "D"),
])
def test_the_shortest_line_of_small_cases(parts: list[str], line: str):
    assert shortest_line(parts) == line


def test_of_two_parts_the_line_is_as_short_as_can_be():
    def common(a: str, b: str) -> int:
        """Length of the longest common subsequence; the slow twin."""
        if not a or not b:
            return 0
        return max(common(a[1:], b), common(a, b[1:]), (common(a[1:], b[1:]) + 1) * (a[0] == b[0]))

    words = ["".join(word) for length in range(1, 5) for word in itertools.product("MD", repeat=length)]
    for a, b in itertools.combinations(words, 2):
        line = shortest_line([a, b])
        assert len(line) == len(a) + len(b) - common(a, b)
        for part in (a, b):
            found = places(part, line)
            assert "".join(line[at] for at in found) == part and sorted(set(found)) == found


def test_every_one_of_many_parts_is_found_in_the_line():
    random = np.random.default_rng(0)
    for _ in range(50):
        parts = ["".join(random.choice(["M", "D"], random.integers(1, 8))) for _ in range(random.integers(1, 6))]
        line = shortest_line(parts)
        assert len(line) >= max(map(len, parts))
        assert all("".join(line[at] for at in places(part, line)) == part for part in parts)


def test_places_are_the_earliest():
    assert places("MM", "MDMM") == [0, 2]
    assert places("DM", "MDMM") == [1, 2]
    assert places("", "MD") == []
    with pytest.raises(ValueError):
        places("DD", "MDM")


@pytest.mark.parametrize(("layers", "mesh", "counts"), [
    (8, Mesh(pipeline=4), (2, 2, 2, 2)),
    (10, Mesh(pipeline=4), (2, 2, 3, 3)),
    (7, Mesh(pipeline=2, chunks=2), (1, 2, 2, 2)),
    (7, Mesh(pipeline=2, stage_layers=(6, 1)), (6, 1)),
    (3, Mesh(), (3,)),
])
def test_layers_are_counted_evenly_or_as_told(layers: int, mesh: Mesh, counts: tuple[int, ...]):
    assert layer_counts(layers, mesh) == counts


@pytest.mark.parametrize(("pattern", "mesh", "found"), [  # [stage][chunk][slot]
    ("MMMM", {"pipeline": 2}, [[[0, 1]], [[2, 3]]]),
    ("MMMMM", {"pipeline": 2}, [[[0, 1, -1]], [[2, 3, 4]]]),
    ("MMMMM", {"pipeline": 2, "stage_layers": (4, 1)}, [[[0, 1, 2, 3]], [[4, -1, -1, -1]]]),
    ("MMMMMM", {"pipeline": 3, "chunks": 2}, [[[0], [3]], [[1], [4]], [[2], [5]]]),
    ("MMMMMMM", {"pipeline": 2, "chunks": 2}, [[[0, -1], [3, 4]], [[1, 2], [5, 6]]]),
    ("DMDM", {"pipeline": 2}, [[[0, 1]], [[2, 3]]]),
    ("DDMM", {"pipeline": 2}, [[[0, 1, -1, -1]], [[-1, -1, 2, 3]]]),
    ("DMMM", {"pipeline": 2}, [[[0, 1, -1]], [[-1, 2, 3]]]),
    ("mMMm", {"pipeline": 2}, [[[0, 1, -1]], [[-1, 2, 3]]]),  # a window makes another layer
    ("mMmM", {"pipeline": 2}, [[[0, 1]], [[2, 3]]]),
])
def test_the_layer_in_every_slot(pattern: str, mesh: dict, found: list):
    assert numbers(pattern, **mesh) == found


LAYOUTS = {
    "even": ("MMMM", Mesh(pipeline=4)),
    "even pairs on all axes": ("DMDM", Mesh(pipeline=2, fsdp=2, tensor=2)),
    "uneven": ("MMMMM", Mesh(pipeline=2, tensor=2)),
    "as told": ("MMMMM", Mesh(pipeline=3, stage_layers=(1, 3, 1))),
    "chunks": ("MMMM", Mesh(pipeline=2, chunks=2, fsdp=2)),
    "uneven chunks": ("DDDDDDD", Mesh(pipeline=2, chunks=2)),
    "mixed": ("DDMMM", Mesh(pipeline=2, data=2)),
    "nothing divides": ("DMMMMMMM", Mesh(pipeline=7)),
    "eight stages": ("DMMMMMMMMMM", Mesh(pipeline=8)),
}


@cache
def of_part(stages: Stages) -> dict[str, str]:
    """Names of the layers' weights in a part, and their axes."""
    return {name: one.axes for name, one in weights.flatten(stages.module).items() if name.startswith("runs.")}


def slots(sharded: Sharded) -> dict[str, np.ndarray]:
    """Name of a part's weight -> the layers of the model there, [stages · chunks, repeats]."""
    stages, found = sharded.stages, {}
    for prefix, mine in transformer.stacks(stages.model).items():
        for name in of_part(stages):
            if prefix_of(name) == prefix:
                found[name] = stages.numbers[:, :, mine].reshape(stages.stages * stages.chunks, -1)
    return found


def there(sharded: Sharded):
    """(the weights of all parts, as global arrays [stages · chunks, repeats, …]; of no layer, per stage) of weights."""
    mesh = dict(sharded.mesh.shape)
    inner = mesh | {"pipeline": 1}
    like = of_part(sharded.stages)
    shapes = {suffix(name): shape for name, shape in sharded.shapes.items() if name.startswith("runs.")}
    local = {name: P("pipeline", *axes.spec(text, shapes[suffix(name)], inner)) for name, text in like.items()}
    shared = {name: P("pipeline", *axes.spec(sharded.axes[name], sharded.shapes[name], inner))
              for name in sharded.shapes if not name.startswith("runs.")}

    def device(values):
        local, shared = sharded.stages.spread(values)
        local = collectives.vary(local, ("pipeline",))
        return local, jax.tree.map(lambda x: x[None], collectives.vary(shared, ("pipeline",)))

    return jax.jit(sharded.program(device, (), (local, shared)))


def suffix(name: str) -> str:
    return name.removeprefix(prefix_of(name))


def of_model(sharded: Sharded) -> dict[str, tuple[str, int]]:
    """(name of what a layer has, its number) -> (name of the stack, row)."""
    return {(suffix(name), layer): (name, row) for prefix, layers in transformer.stacks(sharded.config.model).items()
            for name in sharded.shapes if prefix_of(name) == prefix for row, layer in enumerate(layers)}


def draw(sharded: Sharded) -> dict[str, np.ndarray]:
    """Every entry of every weight differs; those of layer n begin at n + 1."""
    stacks = transformer.stacks(sharded.config.model)
    values = {}
    for name, shape in sharded.shapes.items():
        grain = np.linspace(0, .5, math.prod(shape), dtype=np.float32).reshape(shape)
        first = np.array(stacks.get(prefix_of(name), [0]), np.float32) + 1
        values[name] = grain + first.reshape(-1, *[1] * (len(shape) - 1))
    return values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_comes_to_its_stage_and_its_gradient_back_once(layout: str):
    sharded = make(*LAYOUTS[layout])
    values, program, at = draw(sharded), there(sharded), of_model(sharded)

    def both(values, seed):
        found, back = jax.vjp(program, values)
        random = iter(range(1000))
        grads = jax.tree.map(lambda x: jax.random.normal(jax.random.fold_in(seed, next(random)), x.shape), found)
        return found, grads, back(grads)[0]

    placed = jax.device_put(values, sharded.shardings)
    (local, shared), (local_grads, shared_grads), back = jax.device_get(jax.jit(both)(placed, jax.random.key(1)))
    want = {name: np.zeros_like(value) for name, value in values.items()}
    count = 0
    for name, layers in slots(sharded).items():
        for place in np.ndindex(layers.shape):
            if layers[place] < 0:
                assert not local[name][place].any()
                continue
            source, row = at[suffix(name), layers[place]]
            np.testing.assert_array_equal(local[name][place], values[source][row])
            assert int(local[name][place].min()) == layers[place] + 1
            want[source][row] += local_grads[name][place]
            count += 1
    assert count == len(at)  # every layer of every stack once
    for name, copies in shared.items():
        np.testing.assert_array_equal(copies, np.stack([values[name]] * len(copies)))
        want[name] = shared_grads[name].sum(0)
    for name, gradient in back.items():
        np.testing.assert_allclose(gradient, want[name], rtol=1e-5, atol=1e-5)  # exact but for sums of shared weights


@pytest.mark.parametrize(("layout", "moved"), [
    ("even", []), ("even pairs on all axes", []), ("uneven", ["runs.0.0"]), ("chunks", ["runs.0.0"])])
def test_stacks_that_already_lie_right_are_not_moved(layout: str, moved: list[str]):
    homes = make(*LAYOUTS[layout]).stages.homes
    assert [prefix for prefix, home in homes.items() if not home.in_place] == moved


def test_even_stages_move_nothing_between_devices():
    def text(layout: str) -> str:
        sharded = make(*LAYOUTS[layout])
        return str(jax.make_jaxpr(there(sharded))(draw(sharded)))

    assert "all_to_all" not in text("even") and "all_to_all" in text("uneven")


@pytest.mark.parametrize(("layout", "name", "place"), [
    ("even", "runs.0.0.attention.q", P("pipeline", None, None, None)),
    ("even", "runs.0.0.feed.bias", P("pipeline", None)),
    ("even pairs on all axes", "runs.0.0.feed.mlp.up", P("pipeline", "fsdp", None, "tensor")),
    ("uneven", "embedding", P("tensor", "pipeline")),  # joined before use
    ("uneven", "runs.0.0.feed.up", P(None, None, "pipeline", None, "tensor")),  # 3 experts: along the width 12
    ("uneven", "runs.0.0.feed.bias", P(None, None)),
    ("chunks", "runs.0.0.attention.q", P(None, "fsdp", "pipeline", None)),  # the layers would divide, but lie elsewhere
    ("nothing divides", "embedding", P("pipeline", None)),
    ("nothing divides", "runs.1.0.feed.down", P(None, None, "pipeline", None)),  # 14
    ("nothing divides", "runs.0.0.attention.q", P(None, None, None, None)),
])
def test_how_a_weight_lies(layout: str, name: str, place: P):
    sharded = make(*LAYOUTS[layout])
    assert sharded.specs[name] == place


def test_splits_are_those_of_the_specs():
    for layout in LAYOUTS.values():
        sharded = make(*layout)
        stages = sharded.stages
        resting = {home.sources[0] for home in stages.homes.values() if home.in_place}
        assert set(stages.splits) == {name for name in sharded.shapes if prefix_of(name) not in resting}
        for name, dim in stages.splits.items():
            assert dim != 0 or not name.startswith("runs.")
            assert [d for d, axis in enumerate(sharded.specs[name]) if axis == "pipeline"] == (
                [] if dim is None else [dim])


@pytest.mark.parametrize("layout", ["even", "uneven", "chunks", "uneven chunks", "mixed", "as told"])
def test_figures_of_slots_become_figures_of_layers(layout: str):
    pattern, mesh = LAYOUTS[layout]
    stages = make(*LAYOUTS[layout]).stages
    here = stages.numbers[:, :, stages.moe_slots]
    figures = np.stack([here + 1., 2. * here + 7.], -1).astype(np.float32)  # also where a slot is absent
    devices = make_mesh(mesh, jax.devices()[: mesh.devices()])

    def device(figures):
        return stages.of_layers(figures[0])[None]

    run = jax.shard_map(device, mesh=devices, in_specs=P("pipeline"), out_specs=P("pipeline"))
    found = np.asarray(jax.jit(run)(figures))
    layers = [n for n, kind in enumerate(pattern) if kind == "M"]
    want = np.zeros((mesh.pipeline, len(layers), 2))
    for stage, i in itertools.product(range(mesh.pipeline), range(len(layers))):
        if layers[i] in here[stage]:
            want[stage, i] = layers[i] + 1, 2 * layers[i] + 7
    np.testing.assert_array_equal(found, want)
    assert (want != 0).any(-1).sum() == len(layers)


def test_a_part_is_a_model_of_the_line_of_slots():
    stages = make(*LAYOUTS["mixed"]).stages
    assert stages.model.layer_kinds() == shortest_line(["DD", "MMM"])
    assert not stages.complete and make(*LAYOUTS["even"]).stages.complete
    windows = Stages(Config(model=Model(layers=4, pattern="dMm", window=2, **SIZES), mesh=Mesh(pipeline=2)))
    assert windows.model.layer_letters() == "mdM" and windows.moe_slots == [0, 2]  # of "dM" and "md"
    assert stages.moe_slots == [i for i, kind in enumerate(stages.model.layer_kinds()) if kind == "M"]
