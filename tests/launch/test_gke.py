"""`python -m launch.gke`: the manifest against the published schemas, and a stand-in for kubectl."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from launch import cli, gke
from launch.jobs import again, sweeps
from launch.jobs.job import Job
from tests.support.stand_ins import JOBSET_EXISTS, NO_JOBSETS, Answer, StandIns

TRAIN = ["--", "python", "-m", "launch.train", "--config=configs/7b.py", "--workdir=gs://bucket/7b"]
SWEEP = ["--", "python", "-m", "launch.sweep", "--config=configs/sweeps/isoflop_tiny.py", "--workdir=gs://bucket/iso"]
SLICE = ["--slice=v5p:4x4x4"]
GPUS = ["--nodes=4", "--gpus=8", "--gpu_type=nvidia-h200-141gb"]


def run(*options: str, command: list[str] = TRAIN) -> int:
    for name in gke.FLAGS:  # flags keep their values from one command line to the next
        gke.FLAGS[name].unparse()
    return cli.status(gke.main, gke.FLAGS, ["gke", "--name=lm", "--image=r/lm:1", *options, *command], command=True)


@pytest.fixture
def made(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    def make(*options: str, command: list[str] = TRAIN) -> list[dict[str, Any]]:
        assert run(*options, command=command) == 0
        return list(yaml.safe_load_all(capsys.readouterr().out))

    return make


def problems(manifest: dict[str, Any]) -> str:
    """What the published models of JobSet and of all that it holds of Kubernetes (the package is Kubeflow's) have
    against a manifest: a value of another type, a missing one, or a name that they do not know and so leave out."""
    try:
        model = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest))
    except ValueError as e:
        return str(e)
    assert model is not None
    return "" if model.to_dict() == manifest else "it has names that no schema has"


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return job_of(manifest)["template"]["spec"]


@pytest.mark.parametrize("spot", [[], ["--spot"], ["--reservation=ours", "--service_account=trainer"]])
@pytest.mark.parametrize("machines", [SLICE, GPUS, ["--slice=v6e-1"], ["--gpus=1"]])
def test_the_manifest_is_one_that_the_schemas_know(
    made: Callable[..., list[dict[str, Any]]], machines: list[str], spot: list[str]
) -> None:
    (manifest,) = made(*machines, *spot, "--env=A=b")
    assert problems(manifest) == ""
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["spec"].update(failurePolice=m["spec"].pop("failurePolicy")),
        lambda m: m["spec"]["failurePolicy"].update(maxRestarts="many"),
        lambda m: job_of(m).update(backoffLimit="none"),
        lambda m: job_of(m)["podFailurePolicy"]["rules"][0]["onExitCodes"].pop("operator"),
        lambda m: pod_of(m)["containers"][0].update(images="x"),
        lambda m: pod_of(m)["containers"][0]["env"][0]["valueFrom"]["fieldRef"].pop("fieldPath"),
    ],
)
def test_a_manifest_that_is_wrong_is_seen(
    made: Callable[..., list[dict[str, Any]]], change: Callable[[dict[str, Any]], object]
) -> None:
    (manifest,) = made(*SLICE)
    change(manifest)
    assert problems(manifest) != ""


def test_every_host_of_a_slice_is_a_pod_on_a_node_of_that_slice(made: Callable[..., list[dict[str, Any]]]) -> None:
    (manifest,) = made(*SLICE, "--spot")
    job, pod = job_of(manifest), pod_of(manifest)
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (16, 16, "Indexed")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"} == container["resources"]["requests"]
    assert container["command"][-5:] == ["python", *TRAIN[2:]]
    assert "--host=$(HOST)" in container["command"]
    assert [e["name"] for e in container["env"]] == ["HOST", "JOBSET"]


def test_what_comes_first_runs_first_and_leaves_the_place_to_the_watcher(
    made: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    (manifest,) = made(*SLICE, "--setup=touch fetched")
    command = pod_of(manifest)["containers"][0]["command"]
    assert command[:2] == ["sh", "-c"] and command[4:7] == ["python", "-m", "launch.jobs.again"]
    for setup, status in ((command[2], 7), (command[2].replace("touch", "false"), again.FINAL)):
        done = subprocess.run([*command[:2], setup, "sh", "sh", "-c", "test -f fetched && exit 7"], cwd=tmp_path)
        assert done.returncode == status


def test_processes_on_gpus_are_told_of_each_other(made: Callable[..., list[dict[str, Any]]]) -> None:
    (manifest,) = made(*GPUS)
    (container,) = pod_of(manifest)["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    # JobSet's name of a pod: <jobset>-<replicated job>-<job>-<pod>.<subdomain>
    assert container["command"][-3:] == [
        "--coordinator_address=lm-hosts-0-0.lm:8476",
        "--num_processes=4",
        "--process_id=$(HOST)",
    ]


def outcome(manifest: dict[str, Any], status: int | None) -> str:
    """What the controllers do when a pod ends with this status (None: its node is gone), as Kubernetes and JobSet
    document it: the Job's reason, then the first rule of the JobSet that matches."""
    job, policy = job_of(manifest), manifest["spec"]["failurePolicy"]
    reason = ""
    for rule in job["podFailurePolicy"]["rules"]:
        if status in rule["onExitCodes"]["values"] and rule["onExitCodes"]["operator"] == "In":
            reason = {"FailJob": "PodFailurePolicy"}[rule["action"]]
            break
    if not reason:
        assert job["backoffLimit"] == 0
        reason = "BackoffLimitExceeded"
    matching = (r["action"] for r in policy["rules"] if reason in r.get("onJobFailureReasons", [reason]))
    return next(matching, "RestartJobSet")


def test_statuses_mean_to_the_cluster_what_they_mean_here(made: Callable[..., list[dict[str, Any]]]) -> None:
    (manifest,) = made(*SLICE)
    again_always = "RestartJobSetAndIgnoreMaxRestarts"
    assert {status: outcome(manifest, status) for status in (again.AGAIN, 137, 143, None)} == dict.fromkeys(
        (again.AGAIN, 137, 143, None), again_always
    )
    assert {outcome(manifest, status) for status in again.HOPELESS} == {"FailJobSet"}
    assert pod_of(manifest)["restartPolicy"] == "Never"  # podFailurePolicy asks for it


# ------------------------------------------------------------------------------------------------------------ kubectl


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(tmp_path, monkeypatch)


def test_it_is_sent_with_kubectl(tools: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    tools.add("kubectl", Answer("create --filename=-", "jobset.jobset.x-k8s.io/lm created\n"))
    assert run(*SLICE, "--submit", "--namespace=team") == 0
    (call,) = tools.calls()
    assert yaml.safe_load(call["given"])["metadata"]["namespace"] == "team"
    out = capsys.readouterr().out
    assert "kubectl logs --follow job/lm-hosts-0 --namespace=team" in out
    assert "kubectl delete jobset lm --namespace=team" in out


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        (JOBSET_EXISTS, 2, "kubectl delete jobset lm --namespace=default; the run goes on"),
        (NO_JOBSETS, 1, 'no matches for kind "JobSet"'),
    ],
)
def test_what_kubectl_refuses_is_told(
    tools: StandIns, capsys: pytest.CaptureFixture[str], said: str, status: int, words: str
) -> None:
    tools.add("kubectl", Answer("create", err=said, status=1))
    assert run(*SLICE, "--submit") == status
    told = capsys.readouterr().err
    assert words in told and len(told.splitlines()) <= 3


def test_a_job_without_machines_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "on which machines?" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- sweeps


def test_each_run_of_a_sweep_is_a_jobset(
    made: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(job: Job) -> list[str]:
        assert job.command == tuple(SWEEP[1:])
        return ["embed=16,steps=100", "embed=32,steps=50"]

    monkeypatch.setattr(sweeps, "missing", listed)
    manifests = made("--gpus=1", "--each_run", command=SWEEP)
    assert [problems(m) for m in manifests] == ["", ""]
    assert len({m["metadata"]["name"] for m in manifests}) == 2
    commands = [pod_of(m)["containers"][0]["command"] for m in manifests]
    assert [c[-1] for c in commands] == ["--only=embed=16,steps=100", "--only=embed=32,steps=50"]
    assert "--workdir=gs://bucket/iso/runs/embed=16,steps=100" in commands[0]  # where its starts are counted
    assert made("--gpus=1", "--each_run", command=SWEEP)[0]["metadata"]["name"] == manifests[0]["metadata"]["name"]
    monkeypatch.setattr(sweeps, "missing", lambda job: [])
    assert run("--gpus=1", "--each_run", command=SWEEP) == 0


@pytest.mark.parametrize(
    ("options", "command", "words"),
    [(SLICE, SWEEP, "on one host"), ([*SLICE, "--each_run"], TRAIN, "--each_run is for sweeps")],
)
def test_sweeps_that_cannot_be_sent(
    capsys: pytest.CaptureFixture[str], options: list[str], command: list[str], words: str
) -> None:
    assert run(*options, command=command) == 2
    assert words in capsys.readouterr().err


def test_a_manifest_is_plain_text(made: Callable[..., list[dict[str, Any]]]) -> None:
    """No anchors, no tags: JSON and back is the same."""
    (manifest,) = made(*SLICE)
    assert json.loads(json.dumps(manifest)) == manifest
