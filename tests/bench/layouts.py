"""Does the plan rank layouts as they run?  Twelve small ones on 8 fake devices: predicted and measured seconds of a
step, and the rank correlation (Spearman) of the two.  Fake devices share the cores: what one leaves idle, another uses.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from moejax.config import Config, Data, Mesh, Model, MoE, Train, override
from moejax.parallel import hardware
from moejax.plan import cost
from moejax.plan.count import trace

HERE = Path(__file__).parent
LAYOUTS = [
    "mesh.data=8", "mesh.data=8 train.remat=full", "mesh.data=8 mesh.zero1=true", "mesh.fsdp=8",
    "mesh.fsdp=8 train.microbatches=4", "mesh.tensor=8", "mesh.tensor=8 mesh.sequence=true train.remat=full",
    "mesh.expert=8", "mesh.expert=4 mesh.tensor=2", "mesh.pipeline=4 mesh.data=2 train.microbatches=4",
    "mesh.pipeline=4 mesh.data=2 train.microbatches=16 train.remat=full", "mesh.pipeline=8 train.microbatches=8"]


def config() -> Config:
    return Config(name="layouts", model=Model(layers=8, d_model=256, heads=8, head_dim=32, vocab=2048,
                                              moe=MoE(experts=8, hidden=256)),
                  mesh=Mesh(fake_devices=8), data=Data(sequence=256, batch=32), train=Train())


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def main() -> None:
    device, _ = hardware.named("cpu")
    predicted, measured = [], []
    for layout in LAYOUTS:
        case, problems = override(config(), layout.split())
        assert not problems, problems
        counted = trace(case)
        work, talk = cost.step_seconds(counted.dots, counted.sent, case.mesh.lengths(), "float32", device)
        predicted.append(8 * (work + talk))  # 8 devices on the cores of one
        done = subprocess.run([sys.executable, HERE / "train_step.py", __file__, "3", "mesh.fake_devices=8",
                               *layout.split()], capture_output=True, text=True, check=True)
        measured.append(json.loads(done.stdout.splitlines()[-1])["step_s"])
        print(f"{layout:<70} predicted {predicted[-1]:6.2f} s  measured {measured[-1]:6.2f} s", flush=True)
    print(f"rank correlation {np.corrcoef(ranks(predicted), ranks(measured))[0, 1]:.2f}")


if __name__ == "__main__":
    main()
