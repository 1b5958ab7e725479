"""Groups of processes: which one an environment names, that they compute what one process does, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax import config as configs
from moejax.cli import main
from moejax.config import Config, ConfigError, Data, Mesh, Model, MoE, Train
from moejax.data.batch import Batch
from moejax.model.sharded import Sharded, on_mesh
from moejax.parallel import mesh as meshes, processes
from moejax.parallel.processes import Group, Unreachable, detect
from moejax.train import state as states
from moejax.train.optimizer import make_optimizer
from moejax.train.step import make_evaluation, make_step, validation_loss

MESHES = {"data, expert, tensor": Mesh(data=2, expert=2, tensor=2, fake_devices=8),
          "pipeline": Mesh(pipeline=2, expert=4, fake_devices=8)}
HEARTBEAT = 10
OURS = {"MOEJAX_COORDINATOR": "node7:8476", "MOEJAX_PROCESSES": "4", "MOEJAX_PROCESS": "3"}
SRUN = {"SLURM_JOB_ID": "9", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "a-3"}


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(("environment", "group"), [
    ({}, None),
    ({"PATH": "/bin", "MOEJAX_PROCESSES": ""}, None),
    (OURS, Group(4, 3, "node7:8476", "deactivate")),
    (OURS | SRUN | MPIRUN, Group(4, 3, "node7:8476", "deactivate")),
    (OURS | {"MOEJAX_COORDINATOR": "[fe80::1]:80"}, Group(4, 3, "[fe80::1]:80", "deactivate")),
    ({"MOEJAX_COORDINATOR": "auto"}, Group()),
    (OURS | {"MOEJAX_PROCESSES": "1", "MOEJAX_PROCESS": "0"}, None),
    (SRUN | {"MOEJAX_PROCESSES": "1"}, None),
    (SRUN, Group(4, 3, None, "slurm")),
    (SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # a shell in an allocation of 4 tasks
    (without(without(SRUN, "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NODELIST"), None),  # a batch script outside of srun
    (without(SRUN, "SLURM_PROCID"), None),
    (MPIRUN | ORTE, Group(4, 3, None, "ompi")),
    (MPIRUN, Group(4, 3, None, "mpi4py")),
    (MPIRUN | ORTE | SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, Group(4, 3, None, "ompi")),
    (ORTE | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}, Group()),
    ({"TPU_PROCESS_ADDRESSES": "local"}, None),
    ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, Group()),
    (POD, None),
    (POD | {"JOB_COMPLETION_INDEX": "3"}, Group()),
])
def test_the_group_that_an_environment_names(environment: dict[str, str], group: Group | None):
    assert detect(environment) == group


@pytest.mark.parametrize(("environment", "parts"), [
    (without(OURS, "MOEJAX_PROCESS"), ["set MOEJAX_PROCESS (which this is, from 0) too, or MOEJAX_PROCESSES=1"]),
    ({"MOEJAX_PROCESS": "0"}, ["got MOEJAX_PROCESS alone; set MOEJAX_COORDINATOR (host:port of process 0) and "]),
    (OURS | {"MOEJAX_PROCESSES": "four", "MOEJAX_PROCESS": "-1"}, [
        "MOEJAX_PROCESSES is a whole number, 0 or more; got 'four'", "MOEJAX_PROCESS is a whole number, 0 or more"]),
    (OURS | {"MOEJAX_PROCESS": "4"}, ["MOEJAX_PROCESS must lie below MOEJAX_PROCESSES; got 4 and 4; number"]),
    (OURS | {"MOEJAX_PROCESSES": "0", "MOEJAX_PROCESS": "0"}, ["got 0 and 0; number the processes from 0, or set "]),
    (OURS | {"MOEJAX_COORDINATOR": "node7"}, ["MOEJAX_COORDINATOR is host:port of process 0, or auto on its own; got"]),
    (OURS | {"MOEJAX_COORDINATOR": "node7:65536"}, ["got 'node7:65536'; set it as in 10.0.0.1:8476"]),
    (OURS | {"MOEJAX_COORDINATOR": "auto"}, ["or auto on its own; got 'auto'"]),
])
def test_our_own_variables_are_all_there_and_right(environment: dict[str, str], parts: list[str]):
    with pytest.raises(ConfigError) as error:
        detect(environment)
    assert len(error.value.problems) == len(parts)
    for problem, part in zip(error.value.problems, parts, strict=True):
        assert part in problem


def test_the_flags_of_train_are_these_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    for name in OURS:
        monkeypatch.setenv(name, "")
    (tmp_path / "mine.py").write_text("from moejax.config import Config\nconfig = Config\n")
    assert main(["train", str(tmp_path / "mine.py"), f"run_dir={tmp_path}/run", "--coordinator", "here", "--processes",
                 "2", "--process", "2"]) == 2
    assert {name: os.environ[name] for name in OURS} == dict(zip(OURS, ("here", "2", "2"), strict=True))
    assert "2 problems" in capsys.readouterr().err


@pytest.mark.parametrize(("environment", "part"), [
    (OURS | {"MOEJAX_PROCESSES": "5"}, "got 8 and 5; set mesh.fake_devices to a multiple of 5"),
    ({"MOEJAX_COORDINATOR": "auto"}, "got 8 and a number of processes that only JAX knows; set MOEJAX_COORDINATOR, "),
])
def test_fake_devices_divide_over_the_processes(monkeypatch: pytest.MonkeyPatch, environment, part: str):
    for name in OURS:
        monkeypatch.setenv(name, environment.get(name, ""))
    with pytest.raises(ConfigError, match="shared out evenly") as error:
        meshes.start(Mesh(data=8, fake_devices=8))
    assert part in str(error.value)


def test_a_coordinator_that_cannot_be_reached():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        processes.reach(f"127.0.0.1:{port}", False, 0)
        with pytest.raises(Unreachable, match=f"{port} of this machine cannot be used .*; set another in every"):
            processes.reach(f"127.0.0.1:{port}", True, 0)
    with pytest.raises(Unreachable, match=f"127.0.0.1:{port} did not answer in 0 s .*; start process 0 as well"):
        processes.reach(f"127.0.0.1:{port}", False, 0)


def test_a_group_is_joined_before_jax_is_used(capsys):
    jax.devices()
    with pytest.raises(Unreachable, match=r"must be called before any JAX calls.*or MOEJAX_PROCESSES=1 to run alone"):
        processes.start(Group(2, 0, "127.0.0.1:" + free_port(), "deactivate"))
    assert "process 0 of 2 waits for the others at 127.0.0.1:" in capsys.readouterr().err


def test_a_single_process_is_the_first_and_waits_for_nobody():
    processes.barrier("test")
    assert processes.first()


def config(name: str) -> Config:
    pipeline = MESHES[name].pipeline
    return Config(
        mesh=MESHES[name], data=Data(sequence=16, batch=8), train=Train(microbatches=pipeline),
        model=Model(layers=pipeline, d_model=16, heads=2, head_dim=8, moe=MoE(experts=4, hidden=16)))


def numbers(name: str) -> list[float]:
    """Loss and gradient norm of two steps, and the validation loss after them."""
    sharded = Sharded(config(name), meshes.make_mesh(MESHES[name]))
    optimizer = make_optimizer(configs.Optimizer(warmup=0), 2, states.trained(sharded, sharded.axes))
    state = states.fresh(sharded, optimizer)
    text = np.random.default_rng(0).integers(0, 256, (8, 17)).astype(np.int32)
    batch = Batch(text[:, :-1], text[:, 1:], np.ones((8, 16), np.float32), np.arange(8, dtype=np.int32))
    step = make_step(sharded, optimizer).lower(state, on_mesh(sharded.mesh, batch)).compile()
    processes.barrier("compiled")
    found = []
    for _ in range(2):
        state, figures = step(state, on_mesh(sharded.mesh, batch))
        found += [float(figures["loss"]), float(figures["grad_norm"])]
    return [*found, validation_loss(sharded, make_evaluation(sharded), state.weights, [batch])]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@contextmanager
def group(count: int, folder: Path, *arguments: str) -> Iterator[list[subprocess.Popen]]:
    """`count` processes that run this file as a script; none of them outlives the test."""
    ours = {"MOEJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "MOEJAX_PROCESSES": str(count)}
    with ExitStack() as stack:
        children = []
        for i in range(count):
            output = stack.enter_context((folder / f"{i}.txt").open("w"))
            children.append(stack.enter_context(subprocess.Popen(
                [sys.executable, __file__, str(folder), *arguments], stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | ours | {"MOEJAX_PROCESS": str(i)})))
            stack.callback(children[-1].kill)
        yield children


def printed(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.txt")))


@pytest.mark.parametrize(("count", "names"), [(2, tuple(MESHES)), (4, ("data, expert, tensor",))])
def test_many_processes_compute_what_one_does(count: int, names: tuple[str, ...], tmp_path: Path):
    with group(count, tmp_path, "train", *names) as children:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax promotes
            expected = [numbers(name) for name in names]
        statuses = [child.wait(300) for child in children]
    assert statuses == [0] * count, printed(tmp_path)
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(count)]
    assert found == [found[0] | {"first": i == 0} for i in range(count)]
    assert found[0]["devices"] == [8, 8 // count] and found[0]["peak"]
    # A sum over devices of several processes is taken in another order.
    np.testing.assert_allclose(found[0]["numbers"], expected, rtol=1e-5)


def test_the_others_end_when_a_process_is_killed(tmp_path: Path):
    with group(2, tmp_path, "wait") as children:
        while len(list(tmp_path.glob("*.json"))) < 2:
            assert not any(child.poll() for child in children), printed(tmp_path)
            time.sleep(0.1)
        children[1].send_signal(signal.SIGKILL)
        assert children[0].wait(HEARTBEAT + 10) not in (0, -signal.SIGKILL)
    assert "another task died" in printed(tmp_path)


def child(folder: Path, do: str, *names: str) -> None:
    """What each process of a group does: train on these meshes, or wait for ever."""
    meshes.start(MESHES["pipeline"], HEARTBEAT)
    meshes.start(MESHES["pipeline"], HEARTBEAT)
    out = folder / f"{jax.process_index()}.json"
    if do == "wait":
        processes.barrier("start")
        out.touch()
        processes.barrier("never" if jax.process_index() == 0 else "other")
    found = [numbers(name) for name in names]
    out.write_text(json.dumps({
        "numbers": found, "first": processes.first(), "devices": [jax.device_count(), jax.local_device_count()],
        "peak": meshes.peak_flops(jax.devices()[0]) > 1e7}))
    processes.barrier("done")


if __name__ == "__main__":
    child(Path(sys.argv[1]), *sys.argv[2:])
