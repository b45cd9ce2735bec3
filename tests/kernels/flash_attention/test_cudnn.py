"""What cuDNN refuses, by the GPU that it finds: stand-ins, as no GPU is needed to refuse."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lm_jax.kernels.flash_attention import AttentionMask, cudnn
from lm_jax.kernels.flash_attention.implementation import Call


@dataclasses.dataclass
class Device:
    device_kind: str
    compute_capability: str


V100, A100, H100, B200 = (
    Device(f"NVIDIA {name}", capability)
    for name, capability in (("V100", "7.0"), ("A100", "8.0"), ("H100", "9.0"), ("B200", "10.0"))
)


def refusal(monkeypatch: pytest.MonkeyPatch, devices: list[Any], H: int) -> str | None:
    """What it says of a plain call on a machine with these GPUs."""

    def local_devices(backend: str) -> list[Any]:
        assert backend == "gpu"
        if not devices:
            raise RuntimeError("Unknown backend gpu")
        return devices

    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "device_kind", lambda: devices[0].device_kind if devices else "NVIDIA H100")
    monkeypatch.setattr(jax, "local_devices", local_devices)
    a = jax.ShapeDtypeStruct((1, 16, 2, H), jnp.bfloat16)
    return cudnn.refuses(Call(a, a, a, AttentionMask(), 1.0, return_lse=False))


@pytest.mark.parametrize(("device", "H"), [(A100, 64), (A100, 128), (H100, 8), (H100, 192), (H100, 256), (B200, 256)])
def test_serves(monkeypatch: pytest.MonkeyPatch, device: Device, H: int) -> None:
    assert refusal(monkeypatch, [device], H) is None


@pytest.mark.parametrize(
    ("device", "H", "why"),
    [
        (V100, 64, "it needs a GPU of compute capability 8.0 or more, and NVIDIA V100 has 7.0"),
        (A100, 136, "on NVIDIA A100 it needs a head dim of at most 128 that 8 divides, and it is 136"),
        (A100, 100, "on NVIDIA A100 it needs a head dim of at most 128 that 8 divides, and it is 100"),
        (H100, 264, "on NVIDIA H100 it needs a head dim of at most 256 that 8 divides, and it is 264"),
        (B200, 132, "on NVIDIA B200 it needs a head dim of at most 256 that 8 divides, and it is 132"),
    ],
)
def test_refuses_with_the_reason(monkeypatch: pytest.MonkeyPatch, device: Device, H: int, why: str) -> None:
    assert refusal(monkeypatch, [device], H) == why


@pytest.mark.parametrize("devices", [[], [types.SimpleNamespace(device_kind="NVIDIA H100")]])
def test_a_gpu_that_does_not_say_what_it_is_is_refused(monkeypatch: pytest.MonkeyPatch, devices: list[Any]) -> None:
    assert (refusal(monkeypatch, devices, 64) or "").endswith("and NVIDIA H100 has unknown")
