"""Which environments are jobs of several processes, and which only look so. Nothing here connects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jax._src.clusters import cloud_tpu_cluster

from launch import cluster, train
from lm_jax.errors import UserError
from tests.support import jobs
from tests.support.small_run import write_text

SLURM = jobs.slurm_task(1, 4, 1234)
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
METADATA = {"agent-worker-number": "1", "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2", "tpu-env": ""}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing tells of a cluster."""
    known = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION", "JAX_PLATFORMS")
    for name in [name for name in os.environ if name.startswith(known)]:
        monkeypatch.delenv(name)


def surround(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], tpu: bool = False) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", tpu)


def cloud_metadata(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    def answer(key: str) -> tuple[str, int]:
        return (values[key], 200) if key in values else ("", 404)

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", answer)


JOBS = {
    "slurm": (SLURM, False, cluster.Cluster("SLURM", 4, 1)),
    "mpi": (MPI, False, cluster.Cluster("Open MPI", 2, 1)),
    "gke": (GKE, True, cluster.Cluster("GKE TPU", 4, 2)),
    "gke of two slices": (
        {**GKE, "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"},
        True,
        cluster.Cluster("GKE TPU", 8, 6),
    ),
}
ALONE = {
    "a laptop": ({}, False),
    "salloc's shell": ({k: v for k, v in SLURM.items() if "STEP" not in k and "PROCID" not in k}, False),
    "an interactive step": ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False),
    "one task": ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
    "mpirun of one": ({**MPI, "OMPI_COMM_WORLD_SIZE": "1"}, False),
    "a TPU of one host": ({**GKE, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, True),
    "a TPU pod that is to use its CPU": ({**GKE, "JAX_PLATFORMS": "cpu"}, True),
    "names of TPUs without TPUs": (GKE, False),
    "a pod of Kubernetes": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_recognised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, tpu, expected = JOBS[name]
    cloud_metadata(monkeypatch, {"tpu-env": ""})
    surround(monkeypatch, environment, tpu)
    assert cluster.find() == expected


@pytest.mark.parametrize("name", ALONE)
def test_a_machine_of_its_own_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud_metadata(monkeypatch, {"tpu-env": ""})
    surround(monkeypatch, *ALONE[name])
    assert cluster.find() is None


@pytest.mark.parametrize(("endpoints", "expected"), [("", cluster.Cluster("Cloud TPU", 2, 1)), ("a:1:10.0.0.1", None)])
def test_cloud_tpus_say_it_in_their_metadata(
    endpoints: str, expected: cluster.Cluster | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud_metadata(monkeypatch, METADATA | ({"worker-network-endpoints": endpoints} if endpoints else {}))
    surround(monkeypatch, {}, tpu=True)
    assert cluster.find() == expected


def test_a_cluster_that_does_not_say_enough_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    surround(monkeypatch, {**SLURM, "SLURM_NTASKS": "two"})
    with pytest.raises(UserError, match=r"several processes \(SLURM\)(?s:.*)--num_processes=1") as refused:
        cluster.find()
    assert len(str(refused.value).splitlines()) <= 3


def test_flags_go_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--num_processes=1` runs alone, inside of a job too."""
    from launch import runtime

    surround(monkeypatch, SLURM)
    monkeypatch.setattr(cluster, "find", lambda: pytest.fail("looked for a cluster"))
    monkeypatch.setattr(runtime, "cpu_devices", lambda config, processes: processes)
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    try:
        train.FLAGS(["train", "--workdir=x", "--num_processes=1"])
        runtime.start(train.FLAGS, None)  # type: ignore[arg-type]
    finally:
        train.FLAGS.unparse_flags()
        for flag in ("workdir", "num_processes"):
            train.FLAGS[flag].unparse()


def test_two_tasks_of_slurm_train(tmp_path: Path) -> None:
    """Two processes that are told nothing but what srun tells them."""
    job = jobs.Job(
        tmp_path / "run",
        write_text(tmp_path / "text"),
        tmp_path / "logs",
        processes=2,
        devices=1,
        slurm=True,
        options=["--config.train.steps=3", "--config.evaluation.every=None", "--profile_steps=2:3"],
        env={"LM_JAX_CACHE": str(tmp_path / "cache")},
    )
    try:
        assert job.wait(240) == [0, 0], job.said(0) + job.said(1)
    finally:
        job.kill()
    assert "SLURM: one of 2 processes" in job.said(0) and "SLURM" not in job.said(1)
    traces = jobs.names(tmp_path / "run/profile/plugins/profile/steps_2_3")
    assert {"process_0.xplane.pb", "process_1.xplane.pb"} <= set(traces)
    assert "2 x cpu: data 2" in job.said(0) and jobs.last_step(tmp_path / "run") == 3
