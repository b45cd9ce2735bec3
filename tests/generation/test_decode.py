"""Generation on the cache is what the full forward pass says, row by row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm_jax.errors import ConfigError, UserError
from lm_jax.generation import decode
from lm_jax.generation.decode import generate
from lm_jax.generation.sampling import SamplingConfig
from lm_jax.models.transformer import hidden, init_cache, logits
from tests.support import tiny

C = tiny.config()
PARAMS = tiny.parameters(C)
PROMPTS = [[5, 9, 33], [1], [7, 7, 60, 2, 41, 18, 3], list(range(3, 40))]
DRAWN = SamplingConfig(temperature=0.8, top_k=20, top_p=0.95)


def by_full_forward(prompt: list[int], n: int, **changes: Any) -> list[int]:
    """Greedy, without a cache: the whole text again for each token (in one padded size, so that it compiles once)."""
    ids = list(prompt)
    for _ in range(n):
        padded = np.pad(ids, (0, 64 - len(ids)))[None]
        ids.append(
            int(jnp.argmax(tiny.full_logits(PARAMS, padded, dataclasses.replace(C, **changes))[0, len(ids) - 1]))
        )
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [by_full_forward(p, 12) for p in PROMPTS]


@pytest.mark.parametrize("scan", [True, False])
def test_cached_decoding_equals_the_full_forward(expected: list[list[int]], scan: bool) -> None:
    assert len({tuple(e) for e in expected}) == len(expected)  # rows that could be told apart
    assert generate(PARAMS, PROMPTS, c=dataclasses.replace(C, scan=scan), max_tokens=12) == expected


def test_cached_logits_equal_the_full_forward() -> None:
    """Ragged rows: prompts padded behind their end, then token by token, against one pass over each whole row."""
    tokens = np.random.default_rng(0).integers(0, 64, (3, 16))
    length = np.array([9, 1, 5])
    whole = tiny.full_logits(PARAMS, tokens, C)
    prompt = jnp.asarray(np.where(np.arange(9) < length[:, None], tokens[:, :9], 0))
    first, cache = jax.jit(lambda c: decode._read(PARAMS, prompt, jnp.asarray(length), c, C))(init_cache(C, 3, 20))
    rows = np.arange(3)
    np.testing.assert_allclose(first, whole[rows, length - 1], atol=1e-5)

    @jax.jit
    def step(token_B1: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        x, cache = hidden(PARAMS, token_B1, c=C, cache=cache)
        return logits(PARAMS, x, c=C)[:, 0], cache

    for i in range(7):
        z, cache = step(jnp.asarray(tokens[rows, length + i])[:, None], cache)
        np.testing.assert_allclose(z, whole[rows, length + i], atol=1e-5)
        np.testing.assert_array_equal(jnp.argmax(z, -1), jnp.argmax(whole[rows, length + i], -1))


@pytest.mark.parametrize("sampling", [None, DRAWN])
def test_a_row_depends_on_no_other(sampling: SamplingConfig | None) -> None:
    def run(prompts: list[list[int]]) -> list[list[int]]:
        return generate(PARAMS, prompts, c=C, max_tokens=10, sampling=sampling, seed=5)

    together = run(PROMPTS)
    assert run([PROMPTS[2], *PROMPTS[1:3], [50] * 40])[1:3] == together[1:3]  # others around
    assert run(PROMPTS[:1]) == together[:1]  # alone, and in a smaller bucket of lengths


def test_draws_follow_seed_and_row() -> None:
    def run(seed: int) -> list[list[int]]:
        return generate(PARAMS, [PROMPTS[3]] * 4, c=C, max_tokens=10, sampling=DRAWN, seed=seed)

    assert run(1) == run(1) != run(2)
    assert len({tuple(row) for row in run(1)}) == 4  # the same prompt in four places: four draws


def test_draws_of_a_position_do_not_repeat() -> None:
    """With logits that are the same everywhere, keys that repeated along a row would repeat a token for ever."""
    flat = jax.tree.map(jnp.zeros_like, PARAMS)
    (row,) = generate(flat, [[1]], c=C, max_tokens=30, sampling=DRAWN)
    assert len(set(row)) > 10


def test_a_row_ends_at_the_stop_id(expected: list[list[int]]) -> None:
    stop = next(i for i in expected[2][1:] if not all(i in row for row in expected))
    ended = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert len(ended[2]) < 12 and any(len(row) == 12 for row in ended)
    assert generate(PARAMS, PROMPTS, c=C, max_tokens=12, stop_id=stop) == ended


def test_lengths_are_kept(expected: list[list[int]]) -> None:
    assert generate(PARAMS, PROMPTS, c=C, max_tokens=1) == [row[:1] for row in expected]
    bounded = generate(PARAMS, PROMPTS, c=C, max_tokens=12, max_length=38)
    assert bounded == [row[: min(12, 38 - len(p))] for row, p in zip(expected, PROMPTS, strict=True)]
    assert generate(PARAMS, [], c=C, max_tokens=4) == []


def test_a_text_goes_on_beyond_its_first_bucket() -> None:
    (row,) = generate(PARAMS, [PROMPTS[0]], c=C, max_tokens=32)
    assert row == by_full_forward(PROMPTS[0], 32)


def test_other_prompts_find_it_compiled() -> None:
    def run(prompt: list[int], seed: int, n: int) -> None:
        generate(PARAMS, [prompt], c=C, max_tokens=n, sampling=DRAWN, seed=seed, stop_id=seed)

    run([1, 2], 0, 20)
    before = decode._generate._cache_size()
    run([4, 5, 6, 7], 1, 30)
    assert decode._generate._cache_size() == before
    run(list(range(40)), 2, 20)
    assert decode._generate._cache_size() == before + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": True, "logit_soft_cap": 5.0},
        {"qk_norm": True, "norm": "rms_no_gain"},
        {"position": "alibi", "window": 4, "attention_soft_cap": 3.0, "attention_sinks": True},
    ],
)
def test_variants(changes: dict[str, Any]) -> None:
    c = tiny.config(**changes)
    params = tiny.parameters(c)
    prompt = [3, 4, 5]
    (row,) = generate(params, [prompt], c=c, max_tokens=8)
    z = tiny.full_logits(params, [prompt + row], c)[0]
    assert row == jnp.argmax(z[2:-1], -1).tolist()


def test_computes_in_bfloat16() -> None:
    c = tiny.config(dtype="bfloat16")
    (row,) = generate(PARAMS, [[3, 4, 5]], c=c, max_tokens=8)
    z = tiny.full_logits(PARAMS, [[3, 4, 5, *row]], c)[0, 2:-1]
    chosen = np.take_along_axis(np.asarray(z), np.array(row)[:, None], 1)[:, 0]
    assert (chosen > jnp.max(z, -1) - 0.1).all()  # the best, but for rounding


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 64]]}, "token id 64.*0 to 63"),
        ({"prompts": [[-1]]}, "token id -1"),
        ({"max_length": 2}, "3 tokens and max_length is 2"),
    ],
)
def test_prompts_that_cannot_be_continued(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        generate(PARAMS, c=C, **({"prompts": [[1, 2, 3]], "max_tokens": 4} | arguments))


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        generate(PARAMS, [[1]], c=C, max_tokens=0)


def test_a_damaged_model_is_told() -> None:
    bad = PARAMS | {"final_norm": {"gain": jnp.full((32,), jnp.nan)}}
    with pytest.raises(UserError, match="NaN"):
        generate(bad, [[1]], c=C, max_tokens=4)
