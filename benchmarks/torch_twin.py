"""The same decoder and the same training step in PyTorch, as one would write them there.

Llama's parts (RMSNorm, rotary positions, grouped-query attention, SwiGLU or squared ReLU) with PyTorch's own fast
paths: `scaled_dot_product_attention(is_causal=True)`, fused AdamW, foreach clipping, `zero_grad(set_to_none=True)`, one
matrix for query, key and value and one for gate and up. It takes its weights from ours, so that its losses can be
compared with ours.

Shapes: B batch, T length, D embed, N query heads, K key-value heads, H head dim, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lm_jax.errors import UserError
from lm_jax.models.transformer import TransformerConfig


class Norm(nn.Module):
    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.embed)) if c.norm == "rms" else None
        self.epsilon = c.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.epsilon).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = c.heads, c.key_heads, c.head_size
        self.qkv = nn.Linear(c.embed, (c.heads + 2 * c.key_heads) * c.head_size, bias=False)
        self.out = nn.Linear(c.heads * c.head_size, c.embed, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.size).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.gated = c.feed_forward == "swiglu"
        self.into = nn.Linear(c.embed, (2 if self.gated else 1) * c.inner, bias=False)
        self.down = nn.Linear(c.inner, c.embed, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        if self.gated:
            gate, up = y.chunk(2, -1)
            return self.down(F.silu(gate) * up)
        return self.down(F.relu(y).square())


class Block(nn.Module):
    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(c), Attention(c)
        self.feed_forward_norm, self.feed_forward = Norm(c), FeedForward(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Twin(nn.Module):
    """`forward(tokens, targets)`, `[B, T]` each, gives the mean cross-entropy."""

    def __init__(self, c: TransformerConfig, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.embedding = nn.Embedding(c.ids, c.embed)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.final_norm = Norm(c)
        self.output = nn.Linear(c.embed, c.ids, bias=False)
        if c.tied:
            self.output.weight = self.embedding.weight
        half = c.head_size // 2
        frequency = c.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens).to(self.dtype)  # the residual stream is in the dtype of compute, as ours
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        z = self.output(self.final_norm(x))
        return F.cross_entropy(z.flatten(0, 1).float(), targets.flatten())


def load_weights(model: Twin, weights: Mapping[str, np.ndarray], c: TransformerConfig) -> None:
    """Copies our weights in, given by their names (`blocks/attention/query`, with the layers in front)."""

    def put(parameter: Tensor, value: np.ndarray) -> None:
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def rows(name: str, layer: int, inputs: int = 1) -> np.ndarray:
        """`[inputs..., outputs...]` as PyTorch's `[outputs, inputs]`."""
        w = weights[name][layer]
        return w.reshape(int(np.prod(w.shape[:inputs])), -1).T

    with torch.no_grad():
        put(model.embedding.weight, weights["embedding"])
        if not c.tied:
            put(model.output.weight, weights["output"].T)
        if c.norm == "rms":
            put(model.final_norm.weight, weights["final_norm/gain"])
        into = ("gate", "up") if c.feed_forward == "swiglu" else ("up",)
        for i, block in enumerate(model.blocks):
            heads = [rows(f"blocks/attention/{n}", i) for n in ("query", "key", "value")]
            put(block.attention.qkv.weight, np.concatenate(heads))
            put(block.attention.out.weight, rows("blocks/attention/out", i, 2))
            put(block.feed_forward.into.weight, np.concatenate([rows(f"blocks/feed_forward/{n}", i) for n in into]))
            put(block.feed_forward.down.weight, rows("blocks/feed_forward/down", i))
            if c.norm == "rms":
                put(block.attention_norm.weight, weights["blocks/attention_norm/gain"][i])
                put(block.feed_forward_norm.weight, weights["blocks/feed_forward_norm/gain"][i])


# Of PyTorch's attention, those that keep no scores in memory.
FUSED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def fastest_attention(c: TransformerConfig, batch: int, length: int, device: torch.device) -> SDPBackend:
    """The backend that takes the least time for value and gradients of the model's causal attention. (PyTorch's own
    order has cuDNN last.)

    Raises:
      UserError: none of `FUSED` serves such a call here.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(batch, n, length, c.head_size) for n in (c.heads, c.key_heads, c.key_heads)]
    q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)

    def once() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.heads != c.key_heads)
        torch.autograd.grad(y, (q, k, v), y)

    times: dict[SDPBackend, float] = {}
    for backend in FUSED:
        try:
            with sdpa_kernel(backend):
                times[backend] = _seconds(once, device)
        except RuntimeError:  # it does not serve such a call
            continue
    if not times:
        raise UserError("none of PyTorch's fused kernels serves this attention: the scores would be in memory")
    return min(times, key=lambda backend: times[backend])


def _seconds(f: Callable[[], None], device: torch.device, times: int = 10) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        f()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        f()
    wait()
    return time.perf_counter() - start


def make_step(
    c: TransformerConfig,
    length: int,
    weights: Mapping[str, np.ndarray],
    optimizer: Mapping[str, Any],
    device: torch.device,
    *,
    compiled: bool,
    attention: SDPBackend | None = None,
) -> Callable[[np.ndarray, np.ndarray], Tensor]:
    """A function of (tokens, targets) `[B, T]` that takes one step and gives the loss, still on the device.

    Args:
      c: the model's config.
      length: T.
      weights: ours, by name.
      optimizer: `learning_rate, b1, b2, eps, weight_decay, clip_norm`.
      device: a GPU computes in bfloat16, from float32 weights; a CPU in float32.
      compiled: whether the model runs under `torch.compile`.
      attention: the one backend that may compute attention; None: PyTorch's choice.

    Raises:
      UserError: where the twin lacks something that the config asks for.
    """
    if c.qk_norm or c.logit_soft_cap is not None or c.position != "rope":
        raise UserError("the PyTorch twin has rotary positions, no norm of queries and keys, and no soft cap of logits")
    cuda = device.type == "cuda"
    with device:
        model = Twin(c, length, torch.bfloat16 if cuda else torch.float32)
    load_weights(model, weights, c)
    # As ours: embeddings and gains do not decay.
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or name.startswith("embedding")]
    decayed = [p for p in model.parameters() if all(p is not q for q in plain)]
    groups = [{"params": decayed, "weight_decay": optimizer["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    betas = (optimizer["b1"], optimizer["b2"])
    adamw = torch.optim.AdamW(groups, lr=optimizer["learning_rate"], betas=betas, eps=optimizer["eps"], fused=True)
    run = torch.compile(model) if compiled else model
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if cuda else contextlib.nullcontext()

    def backend() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if attention is None else sdpa_kernel(attention)

    def on_device(a: np.ndarray) -> Tensor:
        t = torch.from_numpy(a.astype(np.int64))
        return t.pin_memory().to(device, non_blocking=True) if cuda else t

    def step(tokens: np.ndarray, targets: np.ndarray) -> Tensor:
        x, y = on_device(tokens), on_device(targets)
        with backend():
            with autocast:
                loss = run(x, y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer["clip_norm"], foreach=True)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()

    return step
