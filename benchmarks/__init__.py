"""Side-by-side runs against peers: `python -m benchmarks.NAME`. Results, with machine and versions: `results/`."""
