"""The files for SLURM and Kubernetes, as far as they can be tried without either.

fixtures/jobset_v1alpha2.schema.json.gz is the openAPIV3Schema of JobSet v1alpha2 in the custom resource definition of
kubernetes-sigs/jobset v0.12.0 (commit f22e565a, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml, Apache-2.0),
as JSON schema: without descriptions, defaults, formats and CEL rules, with int-or-string written out, with the four
top-level fields required, and with unknown fields refused wherever the definition lists the known ones.
"""

import copy
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "launch" / "slurm.sbatch"
SCHEMA = Path(__file__).parents[1] / "fixtures" / "jobset_v1alpha2.schema.json.gz"


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    text = json.loads(gzip.decompress(SCHEMA.read_bytes()))
    jsonschema.Draft202012Validator.check_schema(text)
    return jsonschema.Draft202012Validator(text)


@pytest.fixture(scope="module")
def documents() -> tuple[dict, dict]:
    claim, jobset = yaml.safe_load_all((ROOT / "launch" / "jobset.yaml").read_text())
    return claim, jobset


def job_and_pod(jobset: dict) -> tuple[dict, dict]:
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    return job, job["template"]["spec"]


def test_the_jobset_keeps_the_schema(schema, documents):
    assert not [f"{error.json_path}: {error.message}" for error in schema.iter_errors(documents[1])]


@pytest.mark.parametrize("where, name, value, message", [
    ("jobset", "replicatedJob", [], "'replicatedJob' was unexpected"),
    ("job", "backOffLimit", 0, "'backOffLimit' was unexpected"),
    ("pod", "restartpolicy", "Never", "'restartpolicy' was unexpected"),
    ("container", "volumeMount", [], "'volumeMount' was unexpected"),
    ("job", "parallelism", "2", "'2' is not of type 'integer'")])
def test_the_schema_refuses_what_is_mistyped(schema, documents, where, name, value, message):
    jobset = copy.deepcopy(documents[1])
    job, pod = job_and_pod(jobset)
    {"jobset": jobset["spec"], "job": job, "pod": pod, "container": pod["containers"][0]}[where][name] = value
    [error] = schema.iter_errors(jobset)
    assert message in error.message


def test_the_names_and_numbers_of_the_jobset_agree(documents):
    claim, jobset = documents
    job, pod = job_and_pod(jobset)
    [container] = pod["containers"]
    environment = {each["name"]: each for each in container["env"]}
    name, network = jobset["metadata"]["name"], jobset["spec"]["network"]
    replicated = jobset["spec"]["replicatedJobs"][0]["name"]
    host, _, port = environment["MOEJAX_COORDINATOR"]["value"].partition(":")
    assert host == f"{name}-{replicated}-0-0.{network['subdomain']}" and int(port) > 1023
    assert job["completions"] == job["parallelism"] == int(environment["MOEJAX_PROCESSES"]["value"])
    index = environment["MOEJAX_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert volumes.keys() == {each["name"] for each in container["volumeMounts"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container["args"][:2] == ["moejax", "train"] and (ROOT / container["args"][2]).is_file()


@pytest.mark.parametrize("child, told, status", [
    ("exit 0", False, 0), ("exit 2", False, 2), ("kill -ABRT $$", False, 128 + signal.SIGABRT),
    ("trap 'echo saves; exit 0' TERM; echo waits; while :; do sleep 0.05; done", True, 143)])
def test_a_pod_that_is_told_to_go_fails_after_saving(documents, child, told, status):
    container = job_and_pod(documents[1])[1]["containers"][0]
    process = subprocess.Popen([*container["command"], "sh", "-c", child], stdout=subprocess.PIPE, text=True)
    if told:
        assert process.stdout.readline() == "waits\n"
        process.terminate()
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (status, "saves\n" if told else "")


def test_bash_and_shellcheck_accept_the_sbatch_file():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for command in (["bash", "-n"], [shellcheck]):
        done = subprocess.run([*command, SBATCH], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def slurm(tmp_path):
    """Runs the sbatch file with stand-ins for SLURM's commands that follow a script and note how they were called."""
    def slurm(*words: str, srun: str = "exit 0", job: str = "PreemptTime=None",
              **environment: str) -> tuple[int, list[str], str]:
        calls = tmp_path / "calls"
        for name, script in {"srun": srun, "scontrol": f"echo {job}", "scancel": "kill -TERM $(cat srun.pid)"}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\necho {name} $* >> {calls}\n{script}\n")
            (tmp_path / name).chmod(0o755)
        bash = shutil.which("bash")
        done = subprocess.run([bash, SBATCH, *words], capture_output=True, text=True, cwd=tmp_path, timeout=20,
                              env=os.environ | environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}",
                                                              "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"})
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr

    return slurm


SRUN = "srun --kill-on-bad-exit=1 --cpus-per-task=8 moejax train mine.py train.steps=3"
SHOW = "scontrol show job 7"
REQUEUE = "scontrol requeue 7"


def test_a_job_that_is_done_ends(slurm):
    assert slurm("mine.py", "train.steps=3") == (0, [SRUN, SHOW], "")


def test_a_job_needs_a_config(slurm):
    status, calls, err = slurm()
    assert (status, calls) == (2, []) and err.startswith("usage: sbatch")


def test_a_failed_step_starts_again_but_not_for_ever(slurm):
    assert slurm("mine.py", "train.steps=3", srun="exit 134", RESTARTS="1") == (
        1, [SRUN] * 2, "".join(f"slurm.sbatch: start {start} ended with status 134\n" for start in (1, 2)))
    assert slurm("mine.py", "train.steps=3", srun="exit 1")[1] == [SRUN] * (2 + 4)  # those of before, then 1 + 3


def test_a_mistake_is_not_tried_again(slurm):
    assert slurm("mine.py", "train.steps=3", srun="exit 2") == (2, [SRUN], "")


def test_before_the_time_limit_the_tasks_save_and_the_job_is_queued_again(slurm):
    saves = ("trap 'sleep 0.2; echo saved >> calls; exit 0' TERM; echo $$ > srun.pid; kill -USR1 $PPID\n"
             "while :; do sleep 0.05; done")
    status, calls, err = slurm("mine.py", "train.steps=3", srun=saves)
    assert (status, calls) == (0, [SRUN, "scancel --signal=TERM 7", "saved", REQUEUE])
    assert err == "slurm.sbatch: the time is up; job 7 goes back into the queue\n"


def test_a_preempted_job_is_queued_again(slurm):
    status, calls, _ = slurm("mine.py", "train.steps=3", job="PreemptTime=2030-01-02T03:04:05")
    assert (status, calls) == (0, [SRUN, SHOW, REQUEUE])
