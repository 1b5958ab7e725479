"""Importing published weights: bandwidth and memory against reading the same files.  `published.py [GB] [DTYPE …]`."""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

import moejax

D, F, E, V, KV = 2048, 3584, 8, 32000, 512
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def make(folder: Path, gigabytes: float, dtype: type) -> None:
    """A checkpoint shaped like Mixtral, a file a layer."""
    layers = max(1, round(gigabytes * 1e9 / ((E * 3 * D * F + 2 * D * (D + KV)) * np.dtype(dtype).itemsize)))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": D, "intermediate_size": F,
        "num_hidden_layers": layers, "num_attention_heads": D // 128, "num_key_value_heads": KV // 128,
        "head_dim": 128, "vocab_size": V, "num_local_experts": E, "rope_theta": 1e6}))
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(1 << 22, np.float32) * 0.02).astype(dtype)
    where = {}

    def write(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        save_file({key: np.resize(np.roll(noise, rng.integers(len(noise))), shape) for key, shape in shapes.items()},
                  folder / name, {"format": "pt"})
        where.update(dict.fromkeys(shapes, name))

    write("outside.safetensors", {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D),
                                  "model.norm.weight": (D,)})
    for i in range(layers):
        layer, moe = f"model.layers.{i}.", f"model.layers.{i}.block_sparse_moe."
        experts = {f"{moe}experts.{e}.{w}.weight": (D, F) if w == "w2" else (F, D)
                   for e in range(E) for w in ("w1", "w2", "w3")}
        attention = {f"{layer}self_attn.{x}_proj.weight": (n, D) for x, n in zip("qkvo", (D, KV, KV, D), strict=True)}
        write(f"layer-{i}.safetensors", experts | attention | {
            f"{moe}gate.weight": (E, D), f"{layer}input_layernorm.weight": (D,),
            f"{layer}post_attention_layernorm.weight": (D,)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def read(folder: Path) -> float:
    """Seconds to read every file with the package safetensors, one after another."""
    begin = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        load_file(path)
    return time.perf_counter() - begin


def load(folder: str) -> None:
    """Seconds of a load once JAX has started, and the most memory that it took in GB, beside the weights."""
    jax.devices()
    before = peak()
    begin = time.perf_counter()
    weights = moejax.load(folder).weights
    jax.block_until_ready(weights)
    taken = time.perf_counter() - begin
    print(json.dumps([taken, (peak() - before - sum(x.nbytes for x in weights.values())) / 1e9]))


def peak() -> int:
    """Bytes that this process has had in memory at most, where the system tells."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def main() -> None:
    if sys.argv[1:2] == ["load"]:
        return load(sys.argv[2])
    size = float(sys.argv[1]) if sys.argv[1:] else 4.0
    for name in sys.argv[2:] or TYPES:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            make(folder, size, TYPES[name])
            total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            command, reads, loads = [sys.executable, __file__, "load", place], [], []
            read(folder)  # into the page cache
            for _ in range(3):  # in turn, each load in a process of its own
                reads.append(read(folder))
                loads.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            print(json.dumps({f"import, {name}": {
                "gb": round(total / 1e9, 2),
                "bandwidth / the package safetensors alone (at least 0.5)": round(statistics.median(
                    a / b for a, (b, _) in zip(reads, loads, strict=True)), 2),
                "memory beside the weights, GB (at most a file + 1.07)": round(max(more for _, more in loads), 2),
                "read_s": round(statistics.median(reads), 2),
                "import_s": round(statistics.median(one for one, _ in loads), 2)}}, indent=1), flush=True)


if __name__ == "__main__":
    main()
