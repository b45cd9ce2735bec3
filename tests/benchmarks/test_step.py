"""The comparison of training steps: what is compared on a GPU, what is counted, and one whole run on this machine."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import step
from benchmarks.gpu_clocks import Clocks
from benchmarks.step_workers import peak_bytes
from lm_jax.costs import flops_per_token
from lm_jax.models.transformer import TransformerConfig, transformer_specs
from lm_jax.params import initialize, path_name

ONE_B = "--config=configs/1b.py"


def case_of(*argv: str) -> Any:
    args = step.arguments([*argv])
    (case,) = step.cases(args)
    return case, args


def test_a_gpu_is_given_what_suits_it() -> None:
    case, args = case_of("--platform=gpu", ONE_B)
    assert (case.batch, case.length, case.remat) == (16, 2048, "none")
    assert not case.model.scan and not case.segments and args.without == ["eager"]
    assert case.model.attention_kernel is None
    case, args = case_of(
        "--platform=gpu", ONE_B, "--batch=4", "--scan", "--remat=attention", "--segments", "--attention=xla", "--eager"
    )
    assert (case.batch, case.remat, case.model.scan, case.segments) == (4, "attention", True, True)
    assert case.model.attention_kernel == "xla" and not args.without


def test_elsewhere_a_case_is_what_it_is() -> None:
    case, args = case_of(ONE_B)
    assert (case.batch, case.remat, case.model.scan, case.segments) == (128, "full", True, True)
    assert not args.without and (args.rounds, args.block_seconds) == (20, 0.7)


def test_flops_of_the_1b_step_by_hand() -> None:
    """Six a token and weight: 16 layers of queries and output 2048 x 2048, keys and values 2048 x 512, three matrices
    of 2048 x 8192, and the output 32,000 x 2048, which is the table of embeddings, whose look-up is free. Attention:
    for each of 2048 x 2049 / 2 pairs of a row, 16 layers, 32 heads and 64 features, 2 FLOPs for the score and 2 for the
    value, and twice that backward."""
    case, _ = case_of("--platform=gpu", ONE_B)
    weights = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192) + 32_000 * 2048
    assert 1_038_682_112 - weights == 33 * 2048  # the gains of the norms are no matrices
    pairs = 2048 * 2049 / 2
    assert flops_per_token(case.model, 2048) == pytest.approx(6 * weights + 12 * 16 * 32 * 64 * pairs / 2048, rel=1e-12)


def test_ours_on_this_machine(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """A process of its own, without PyTorch; rows of one document need no segment ids."""
    file = tmp_path / "result.json"
    flags = ["--case=nano", "--batch=2", "--rounds=2", "--block-seconds=0.01", "--no-segments", "--no-eager"]
    assert step.main([*flags, "--without=compiled", f"--json={file}"]) == 0
    result = json.loads(file.read_text())["cases"]["nano"]
    assert result["about"]["attention"] == "xla" and result["batch"] == 2 and not result["segments"]
    seconds = result["milliseconds"]["ours"]["median"] / 1e3
    assert result["tokens_per_second"]["ours"] == pytest.approx(2 * 64 / seconds)
    assert result["tflops"]["ours"] == pytest.approx(2 * 64 * flops_per_token(step.NANO, 64) / seconds / 1e12)
    assert result["peak_bytes"] == {"ours": None} and "mfu" not in result
    assert "attention ours by xla" in capfd.readouterr().out


def test_attention_that_cannot_serve_is_refused_by_name(capfd: pytest.CaptureFixture) -> None:
    flags = ["--case=nano", "--attention=pallas_gpu", "--no-eager", "--without=compiled"]
    assert step.main(flags) == 2
    assert "implementation 'pallas_gpu' cannot serve this call: it needs an NVIDIA Hopper GPU" in capfd.readouterr().err


def test_a_gpu_s_memory_is_shared() -> None:
    """Ours has what it plans, and the others as much each: 11.6 GiB of state, and 2.5 for a row."""
    for programs, rows in ((2, step.GPU_ROWS), (3, step.GPU_ROWS // 2)):
        share = float(step.shared_memory(programs)["XLA_PYTHON_CLIENT_MEM_FRACTION"])
        assert 11.6 + 2.5 * rows < share * 139.8
        assert share < (1 - share) / (programs - 1)
    assert len(step.RUNNERS) == 3


def test_the_device_s_own_peak_is_taken() -> None:
    gpu = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 3, "peak_bytes_in_use": 7})
    assert peak_bytes(gpu) == 7
    assert peak_bytes(SimpleNamespace(memory_stats=lambda: None)) is None


def test_clocks_are_those_of_a_program_s_own_blocks() -> None:
    program = "import time\nfor mhz in [1980] * 4 + [1200] * 40:\n print(mhz, ', 700.5', flush=True)\n time.sleep(0.05)"
    clocks = Clocks((sys.executable, "-c", f"print('[N/A], [N/A]', flush=True)\n{program}"))
    try:
        while len(clocks.samples) < 10:
            time.sleep(0.01)
    finally:
        clocks.close()
    when = [s[0] for s in clocks.samples]
    assert clocks.during([(when[0], when[3])]) == {"MHz": 1980, "W": 700.5, "n": 4}
    assert clocks.during([(when[0], when[0]), (when[5], when[6])]) == {"MHz": 1200, "W": 700.5, "n": 3}
    assert clocks.during([(0.0, 0.1)]) is None
    missing = Clocks(("no-such-program",))
    assert missing.during([(0.0, 1e9)]) is None
    missing.close()


def test_pytorch_attends_by_a_kernel_that_keeps_no_scores() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.torch_twin import FUSED, fastest_attention, make_step

    backends, here = torch.nn.attention.SDPBackend, torch.device("cpu")
    assert backends.MATH not in FUSED
    c = TransformerConfig(layers=1, embed=64, heads=4, kv_heads=2, vocab=64)
    assert fastest_attention(c, 2, 64, here) == backends.FLASH_ATTENTION
    params = initialize(transformer_specs(c), jax.random.key(0))
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    weights: Any = {path_name(path): np.array(leaf) for path, leaf in leaves}
    rows = np.random.default_rng(0).integers(0, 64, (2, 65))

    def loss(attention: Any) -> float:
        given: Any = {"compiled": False, "attention": attention}
        return float(make_step(c, 64, weights, step.CASES["nano"].optimizer, here, **given)(rows[:, :-1], rows[:, 1:]))

    assert loss(backends.FLASH_ATTENTION) == pytest.approx(loss(None), rel=1e-6)
    with pytest.raises(RuntimeError):  # what cannot serve is not replaced by what can
        loss(backends.CUDNN_ATTENTION)
