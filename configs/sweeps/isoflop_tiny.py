"""IsoFLOP profiles (Chinchilla's approach 2): four sizes at each of four budgets, from which the law is fitted.

Three seeds of each, as runs this small scatter by about half a percent. The blocks' matrices are trained with Muon:
for as many FLOPs it ends lower than AdamW, and scatters less. Its learning rate falls with the square root of the
budget: one rate for all is too low for the small budgets and too high for the large ones, and bends the law. The
largest budget is held out: the law of the others predicts its loss.

    python -m launch.sweep --config=configs/sweeps/isoflop_tiny.py --workdir=runs/isoflop_tiny
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.sweeps.base import in_proportion, small
from lm_jax.scaling.sweep import Points, Sweep

REPORT = "law"


def get_config() -> ConfigDict:
    config = small()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-2  # best for 8e11 FLOPs
    return config


def sweep(s: Sweep) -> Points:
    def profile(budget: float, widths: tuple[int, ...]) -> Points:
        rate = 2e-2 * (8e11 / budget) ** 0.5
        sizes = s.conditional(
            s.each("model.embed", widths), lambda _: {"optimizer.learning_rate": float(f"{rate:.3g}")}
        )
        return s.budget([budget], sizes)

    profiles = s.chain(
        profile(2.4e11, (24, 32, 40, 48)),
        profile(6e11, (32, 40, 48, 64)),
        profile(1.2e12, (40, 48, 64, 80)),
        profile(2.4e12, (48, 64, 80, 96)),
    )
    return in_proportion(s, s.product(profiles, s.seeds(3)))
