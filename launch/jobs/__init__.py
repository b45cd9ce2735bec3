"""A run as a job on many machines: what it is (`job`), what starts it again (`again`), and how each kind of cluster is
told (`gcloud` and `tpu_pod`, `jobset`, `slurm`)."""
