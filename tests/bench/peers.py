"""The small Mixtral of configs/peer_mixtral.py in moejax, transformers and MaxText, in turn on the same cores.

Each peer gets a virtual environment of its own (.venv-transformers, .venv-maxtext; several GB) unless one is named by
TRANSFORMERS_PYTHON or MAXTEXT_PYTHON.  Prints seconds of a training step, and how many times faster moejax is: the
median of the rounds' ratios.  `peers.py [ROUNDS] [CASE …]`.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
MESH = ["mesh.expert=4", "mesh.tensor=2", "mesh.sequence=true", "mesh.fake_devices=8"]
CAPACITY = ["model.moe.capacity_factor=1.25", "model.moe.dispatcher=sorted"]
DROP = {"capacity_factor": 1.25, "sparse_matmul": "false"}
CASES = {  # name: (least ratio, what moejax is told, MaxText's devices and flags, or None for transformers)
    "transformers, dropless, one device": (0.7, [], None),
    "MaxText, capacity 1.25, one device": (2.5, CAPACITY, (1, DROP)),
    "MaxText, dropless, one device": (5.0, [], (1, {"capacity_factor": -1, "sparse_matmul": "true"})),
    "MaxText, capacity 1.25, expert 4 × tensor 2": (2.5, CAPACITY + MESH, (8, DROP | {
        "ici_fsdp_parallelism": 1, "ici_expert_parallelism": 4, "ici_tensor_parallelism": 2})),
}


def environment(folder: str, python: str, install: Callable[[str], list[list[str]]]) -> str:
    """A virtual environment's Python, made on first use."""
    made = Path(folder) / "bin" / "python"
    if not (Path(folder) / "ready").exists():
        for command in [[python, "-m", "venv", "--clear", folder], *install(str(made))]:
            subprocess.run(command, check=True, env=os.environ | {"VIRTUAL_ENV": folder})
        (Path(folder) / "ready").touch()
    return str(made)


def transformers_python() -> str:
    return os.environ.get("TRANSFORMERS_PYTHON") or environment(
        ".venv-transformers", sys.executable, lambda python: [
            [python, "-m", "pip", "install", "-q", "torch==2.13.0", "transformers==5.23.0"]])


def maxtext_python() -> str:
    if "MAXTEXT_PYTHON" in os.environ:
        return os.environ["MAXTEXT_PYTHON"]
    named = [shutil.which("python3.12") or "", *map(str, Path.home().glob(".pyenv/versions/3.12*/bin/python"))]
    # A name on the PATH may be pyenv's, for a version that is not switched on.
    works = (p for p in named if p and subprocess.run([p, "--version"], capture_output=True).returncode == 0)
    python = next(works, None)
    if python is None:
        sys.exit("MaxText needs Python 3.12; set MAXTEXT_PYTHON")
    return environment(".venv-maxtext", python, lambda python: [
        [python, "-m", "pip", "install", "-q", "uv"],
        [python, "-m", "uv", "pip", "install", "-q", "maxtext[tpu]==0.2.5", "--resolution=lowest"]])


def ours(overrides: list[str], steps: int) -> float:
    command = [sys.executable, str(HERE / "train_step.py"), "configs/peer_mixtral.py", str(steps), *overrides]
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as the moejax command sets for itself
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)["step_s"]


def transformers(steps: int) -> float:
    command = [transformers_python(), str(HERE / "peer_transformers.py"), str(steps)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["step_s"]


def maxtext(devices: int, flags: dict, steps: int) -> float:
    """Median time between its "completed step" lines, after 4 that hold compilation and the filling of its queue."""
    python = maxtext_python()
    base = subprocess.run([python, "-c", "import importlib.util as u; print(u.find_spec('maxtext')."
                           "submodule_search_locations[0])"], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as out:
        flags = {
            "hardware": "cpu", "skip_jax_distributed_system": "true", "dataset_type": "synthetic",
            "enable_checkpointing": "false", "enable_tensorboard": "false", "log_config": "false", "run_name": "peer",
            "decoder_block": "mixtral", "vocab_size": 8192, "base_emb_dim": 256, "base_num_decoder_layers": 4,
            "base_num_query_heads": 8, "base_num_kv_heads": 2, "head_dim": 32, "num_experts": 8,
            "num_experts_per_tok": 2, "base_mlp_dim": 512, "base_moe_mlp_dim": 512, "max_target_length": 512,
            "attention": "dot_product", "dtype": "float32", "weight_dtype": "float32", "megablox": "false",
            "base_output_directory": out, "jax_cache_dir": "", "steps": steps + 5,
            "per_device_batch_size": 8 // devices,
        } | flags
        command = [python, "-m", "maxtext.trainers.pre_train.train", f"{base}/configs/base.yml",
                   *(f"{key}={value}" for key, value in flags.items())]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
                            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        env.pop("PYTHONPATH", None)
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            lines = [(time.perf_counter(), line) for line in process.stdout]
    times = [at for at, line in lines if "completed step:" in line]
    if len(times) < 6:
        sys.exit("MaxText failed:\n" + "".join(line for _, line in lines[-20:]))
    return statistics.median(b - a for a, b in itertools.pairwise(times[3:]))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for name, (least, overrides, peer) in CASES.items():
        if sys.argv[2:] and not any(word in name for word in sys.argv[2:]):
            continue
        pairs = [(ours(overrides, 8), transformers(8) if peer is None else maxtext(*peer, 8)) for _ in range(rounds)]
        print(json.dumps({name: {
            f"moejax is faster by (at least {least})": round(statistics.median(b / a for a, b in pairs), 2),
            "moejax_s": [round(a, 3) for a, _ in pairs], "peer_s": [round(b, 3) for _, b in pairs]}}), flush=True)


if __name__ == "__main__":
    main()
