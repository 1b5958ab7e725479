"""What seeing costs: `vision.py`, as JSON.

- a step on text alone of a model that sees, over that of the same model without eyes (two processes' worth of state in
  one, in turn)
- the memory of a step whose text, or text and encoder, is frozen, as compiled
- pictures decoded a second on one core
- the share of a step that waits for pictures (configs/vision_demo.py, with its workers)
"""

import io
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from moejax.config import Mesh, load_config
from moejax.data.batch import Batch
from moejax.data.images import Ref, decode
from moejax.data.loader import open_corpus
from moejax.data.samples import make_samples, train_batch
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel.mesh import make_mesh
from moejax.train.optimizer import make_optimizer
from moejax.train.state import fresh, trained
from moejax.train.step import make_step

ROUNDS, PICTURES = 30, 200
CONFIG = load_config("configs/vision_demo.py")


def on_one_device(config):
    config = replace(config, mesh=Mesh(), train=replace(config.train, microbatches=1))
    sharded = Sharded(config, make_mesh(config.mesh, jax.devices()[:1]))
    optimizer = make_optimizer(config.optimizer, config.train.steps, trained(sharded, sharded.axes))
    return sharded, fresh(sharded, optimizer), make_step(sharded, optimizer)


def text_alone() -> dict:
    blind = replace(CONFIG.model, pattern=CONFIG.model.layer_kinds(), vision="", cross="")
    data = replace(CONFIG.data, images=0, sequence=256, batch=16)
    cases = {name: on_one_device(replace(CONFIG, data=data, model=model)) for name, model in (
        ("sees", CONFIG.model), ("blind", blind))}
    random, taken = np.random.default_rng(0), {name: [] for name in cases}
    states = {name: state for name, (_, state, _) in cases.items()}
    for _ in range(ROUNDS + 2):
        tokens = random.integers(0, 256, (data.batch, data.sequence + 1), dtype=np.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((data.batch, data.sequence), np.float32),
                      np.arange(data.batch, dtype=np.int32))
        for name, (sharded, _, step) in cases.items():
            placed, begin = on_mesh(sharded.mesh, batch), time.perf_counter()
            states[name], figures = step(states[name], placed)
            jax.block_until_ready((states[name], figures))
            taken[name].append(time.perf_counter() - begin)
    pairs = [a / b for a, b in zip(taken["sees"][2:], taken["blind"][2:], strict=True)]
    return {"step of a model that sees / without eyes (at most 1.02)": round(statistics.median(pairs), 3),
            "quarters": [round(each, 3) for each in statistics.quantiles(pairs, n=4)]}


def frozen() -> dict:
    found = {}
    for freeze in ((), ("text",), ("text", "encoder")):
        sharded, state, step = on_one_device(replace(CONFIG, train=replace(CONFIG.train, freeze=freeze)))
        config, corpus = sharded.config, open_corpus(CONFIG.data, CONFIG.model.vocab)
        samples = make_samples(config, corpus, "train")
        batch = on_mesh(sharded.mesh, train_batch(samples, config.data.batch, 0))
        samples.close()
        memory = step.lower(state, batch).compile().memory_analysis()
        sizes = {"weights": state.weights, "trained": trained(sharded, state.weights), "optimizer": state.optimizer}
        sizes = {f"{name}_mb": sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in sizes.items()}
        found["+".join(freeze) or "nothing"] = {name: round(size / 1e6, 2) for name, size in sizes.items()} | {
            "arguments_mb": round(memory.argument_size_in_bytes / 1e6, 2),
            "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 2)}
    return found


def decoding() -> dict:
    rows, columns = np.mgrid[:375, :500]
    random, found = np.random.default_rng(0), {}
    waves = (30, 41), (23, 57), (61, 17)
    photo = np.stack([127 + 100 * np.sin(rows / a) * np.cos(columns / b) for a, b in waves], -1)
    photo = Image.fromarray((photo + random.normal(0, 8, photo.shape)).clip(0, 255).astype(np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        for kind, image in (("jpeg 500×375", photo), ("jpeg 224×224", photo.resize((224, 224))),
                            ("png 224×224", photo.resize((224, 224)))):
            buffer, path = io.BytesIO(), Path(folder) / kind.replace(" ", ".")
            image.save(buffer, kind.split()[0])
            path.write_bytes(buffer.getvalue())
            begin = time.process_time()
            for _ in range(PICTURES):
                assert not isinstance(decode(Ref(path.name, str(path), 0, -1, False), 224, "crop", 1, 1.0), str)
            found[f"{kind} a second of one core (at least 200)"] = round(PICTURES / (time.process_time() - begin))
    return found


def waiting() -> dict:
    sharded, state, step = on_one_device(CONFIG)
    samples = make_samples(CONFIG, open_corpus(CONFIG.data, CONFIG.model.vocab), "train")
    shares, size = [], CONFIG.data.batch
    for number in range(ROUNDS):
        begin = time.perf_counter()
        batch = on_mesh(sharded.mesh, train_batch(samples, size, number))
        for later in (1, 2):
            samples.ahead((number + later) * size + np.arange(size))
        reading = time.perf_counter() - begin
        state, figures = step(state, batch)
        jax.block_until_ready(figures)
        shares.append(reading / (time.perf_counter() - begin))
    samples.close()
    return {"share of a step that waits for its batch (at most 0.05)": round(statistics.median(shares[2:]), 4),
            "pictures a step": int(np.sum(batch.images.frames))}


if __name__ == "__main__":
    for name, measure in (("text alone", text_alone), ("frozen", frozen), ("decoding", decoding), ("waiting", waiting)):
        print(json.dumps({name: measure()}, indent=1, ensure_ascii=False), flush=True)
