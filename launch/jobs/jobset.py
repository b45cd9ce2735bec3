"""A job as a JobSet of Kubernetes, for TPU slices and GPU nodes of GKE.

One pod a host, all of them one indexed Job. Any pod that fails fails the Job, and the JobSet makes the whole Job anew:
JAX's processes start together or not at all. A pod that ends with a status of `again.HOPELESS` fails the JobSet for
good: the Job's podFailurePolicy sees the status, the JobSet's failurePolicy sees that policy at work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import yaml

from launch.jobs import again
from launch.jobs.job import COORDINATOR_PORT, Job
from lm_jax.errors import UserError

GROUP = "hosts"  # the replicated job; its pods are NAME-hosts-0-INDEX
_GRACE_SECONDS = 120  # to save in when a pod is told to go; Google takes spot nodes away after 30
_LABEL = "app.kubernetes.io/managed-by"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What a manifest says of the cluster.

    Attributes:
      image: the container's, with the project and what it needs in its working directory.
      namespace: where the JobSet lives.
      service_account: of Kubernetes, that may use the run's bucket; empty: the namespace's default.
      spot: whether on spot nodes,
      reservation: or on those of a reservation.
    """

    image: str
    namespace: str = "default"
    service_account: str = ""
    spot: bool = False
    reservation: str = ""


def manifest(job: Job, cluster: Cluster, identity: str) -> dict[str, Any]:
    """The JobSet.

    Args:
      job: what it runs.
      cluster: where.
      identity: which job this is, for the count of its starts; of a JobSet that is made once more from the same
        manifest, the cluster tells by its uid, where JobSet is new enough to have it as a label.

    Raises:
      UserError: the job names no machines.
    """
    if job.slice is None and not job.gpus:
        raise UserError("on which machines?\ngive --slice=v5p:4x4x4, or --nodes and --gpus with --gpu_type")
    metadata: dict[str, Any] = {"name": job.name, "namespace": cluster.namespace, "labels": {_LABEL: "lm-jax"}}
    if job.slice is not None and job.slice.hosts > 1:
        # A slice is a node pool: none of its hosts for another job.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": 0,  # those of no rule: `again` counts starts, and knows which of them made steps
                "rules": [
                    {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                    {"name": "again", "action": "RestartJobSetAndIgnoreMaxRestarts"},
                ],
            },
            "replicatedJobs": [{"name": GROUP, "replicas": 1, "template": {"spec": _job(job, cluster, identity)}}],
        },
    }


def text(manifests: Sequence[dict[str, Any]]) -> str:
    """Manifests as YAML, as `kubectl apply -f` reads them."""
    return yaml.safe_dump_all(manifests, sort_keys=False, width=1000)


def _job(job: Job, cluster: Cluster, identity: str) -> dict[str, Any]:
    return {
        "parallelism": job.hosts,
        "completions": job.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "main", "operator": "In", "values": sorted(again.HOPELESS)},
                }
            ]
        },
        "template": {"spec": _pod(job, cluster, identity)},
    }


def _pod(job: Job, cluster: Cluster, identity: str) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "nodeSelector": _nodes(job, cluster),
        "containers": [_container(job, cluster, identity)],
    }
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    if cluster.spot:
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        pod["tolerations"] = [spot]
    if job.gpus:  # NCCL's processes share more memory than the 64 MB that a container has
        pod["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    return pod


def _nodes(job: Job, cluster: Cluster) -> dict[str, str]:
    labels = {}
    if job.slice is not None:
        labels["cloud.google.com/gke-tpu-accelerator"] = job.slice.gke_accelerator
        labels["cloud.google.com/gke-tpu-topology"] = job.slice.topology
    elif job.gpu_type:
        labels["cloud.google.com/gke-accelerator"] = job.gpu_type
    if cluster.spot:
        labels["cloud.google.com/gke-spot"] = "true"
    if cluster.reservation:
        labels["cloud.google.com/reservation-name"] = cluster.reservation
    return labels


def _container(job: Job, cluster: Cluster, identity: str) -> dict[str, Any]:
    resource = "google.com/tpu" if job.slice else "nvidia.com/gpu"
    each = str(job.slice.chips_per_host if job.slice else job.gpus)
    command = job.watched(f"{identity}-$(JOBSET)", host="$(HOST)")
    if job.slice is None and job.hosts > 1:  # on TPUs GKE tells jax by itself
        command += [
            f"--coordinator_address={job.name}-{GROUP}-0-0.{job.name}:{COORDINATOR_PORT}",
            f"--num_processes={job.hosts}",
            "--process_id=$(HOST)",
        ]
    if job.setup:
        command = ["sh", "-c", f'({job.setup}) || exit {again.FINAL}; exec "$@"', "sh", *command]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    jobset = "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"
    container: dict[str, Any] = {
        "name": "main",
        "image": cluster.image,
        "command": command,
        "env": [
            {"name": "HOST", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            {"name": "JOBSET", "valueFrom": {"fieldRef": {"fieldPath": jobset}}},
            *({"name": name, "value": value} for name, value in job.environment),
        ],
        "resources": {"requests": {resource: each}, "limits": {resource: each}},
    }
    if job.slice is None:
        container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]
    return container
