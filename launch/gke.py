"""Makes a JobSet of Kubernetes for a job on TPU slices or GPU nodes of GKE, and sends it.

    python -m launch.gke --name=lm-7b --slice=v5p:4x4x4 --image=IMAGE -- \\
        python -m launch.train --config=configs/7b.py --workdir=gs://bucket/7b

prints the manifest; --submit gives it to kubectl. The job is started again after a preemption or the loss of a host,
and ends by itself after three starts without a new step (launch/jobs/again.py). See docs/pods.md.
"""

from __future__ import annotations

import time

from absl import flags

from launch import cli
from launch.jobs import jobset, tools
from launch.jobs.job import define_flags, job_of
from launch.jobs.sweeps import each_run
from lm_jax.errors import UserError

FLAGS = flags.FlagValues()
define_flags(FLAGS, tpus=True, gpus=True)
IMAGE = flags.DEFINE_string(
    "image", None, "the container's image, with the project in its working directory", required=True, flag_values=FLAGS
)
NAMESPACE = flags.DEFINE_string("namespace", "default", "of Kubernetes", flag_values=FLAGS)
SERVICE_ACCOUNT = flags.DEFINE_string(
    "service_account", "", "of Kubernetes, that may use the run's bucket; empty: the default one", flag_values=FLAGS
)
SPOT = flags.DEFINE_bool("spot", False, "on spot nodes, which may be taken away", flag_values=FLAGS)
RESERVATION = flags.DEFINE_string("reservation", "", "on nodes of this reservation", flag_values=FLAGS)
EACH_RUN = flags.DEFINE_bool("each_run", False, "of a sweep: a job for each run that has not ended", flag_values=FLAGS)
SUBMIT = flags.DEFINE_bool("submit", False, "send it with kubectl, instead of printing it", flag_values=FLAGS)


def main(words: list[str], command: list[str]) -> None:
    if words:
        raise UserError(f"unexpected argument {words[0]!r}: flags are written --name=value")
    job = job_of(FLAGS, command, shared_disk=False)
    cluster = jobset.Cluster(IMAGE.value, NAMESPACE.value, SERVICE_ACCOUNT.value, SPOT.value, RESERVATION.value)
    jobs = each_run(job) if EACH_RUN.value else [job]
    if not jobs:
        print("all runs have ended: the sweep's own command collects them")
        return
    text = jobset.text([jobset.manifest(one, cluster, f"{one.name}-{int(time.time())}") for one in jobs])
    if not SUBMIT.value:
        print(text, end="")
        return
    try:
        tools.call(["kubectl", "create", "--filename=-"], seconds=tools.ASK, given=text)
    except tools.ToolFailed as e:
        if "AlreadyExists" not in e.said:
            raise
        raise UserError(
            f"there is a JobSet {job.name} already\n"
            f"if it is over: kubectl delete jobset {job.name} --namespace={NAMESPACE.value}; the run goes on"
        ) from e
    for one in jobs:
        where = f"--namespace={NAMESPACE.value}"
        print(f"{one.name} is sent. It is at: kubectl get jobset {one.name} {where}")
        print(f"  its log:  kubectl logs --follow job/{one.name}-{jobset.GROUP}-0 {where}")
        print(f"  its end:  kubectl delete jobset {one.name} {where}")


if __name__ == "__main__":
    cli.run(main, FLAGS, command=True)
