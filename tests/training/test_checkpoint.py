"""Checkpoints: what was saved comes back bit for bit, or not at all."""

import json
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lm_jax.errors import ConfigError, UserError
from lm_jax.paths import StorageError
from lm_jax.training import checkpoint, checkpoint_reader, steps
from lm_jax.training.checkpoint import CheckpointConfig, Checkpointer
from lm_jax.training.checkpoint_reader import CheckpointReader

Tree = Any
DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int32", "uint8", "bool")


def _tree(step: int = 1, impl: str | None = None) -> Tree:
    """A small state with a leaf of every kind; its values follow from the step. Leaves above 1 KiB have bytes of their
    own in a file; smaller ones stand in nodes that have checksums."""
    key = jax.random.fold_in(jax.random.key(7), step)
    params = {"layer": {"w": jax.random.normal(key, (64, 24))}, "b": jnp.full((8,), step, jnp.float32)}
    return {
        "params": params,
        "ema": jax.tree.map(lambda x: x + 1, params),
        "opt": (jax.random.normal(key, (700,)).astype(jnp.bfloat16), {"count": jnp.int32(step)}),
        "kinds": {name: jnp.asarray(jax.random.normal(key, (1500,)) * 9).astype(name) for name in DTYPES},
        "key": jax.random.key(step, impl=impl),
        "keys": jax.random.split(key, 200),
    }


def _raw(x: jax.Array) -> bytes:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def _same(a: Tree, b: Tree) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and x.shape == y.shape and _raw(x) == _raw(y), a, b)
    )


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str]) -> Iterator[Callable[..., Checkpointer]]:
    """Makes checkpointers of one folder; closes them."""
    made: list[Checkpointer] = []

    def build(**config: Any) -> Checkpointer:
        made.append(
            Checkpointer(epath.Path(tmp_path / "checkpoints"), CheckpointConfig(every=1, **config), said.append)
        )
        return made[-1]

    yield build
    for checkpointer in made:
        checkpointer.close()


def _save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        assert checkpointer.save(step, _tree(step), {"rows": 10 * step})
        checkpointer.wait()


def _folders(checkpointer: CheckpointReader) -> set[str]:
    return {path.name for path in checkpointer.directory.iterdir()}


# ----------------------------------------------------------------------------------------------------------- round trip


def test_what_was_saved_comes_back(make: Callable[..., Checkpointer], said: list[str]) -> None:
    _save(make(), 1, 2)
    restored = make().restore(_tree(0))
    assert restored is not None and restored.step == 2 and restored.metadata == {"rows": 20}
    assert _same(restored.tree, _tree(2))
    assert said == []
    first = make().restore(_tree(0), step=1)
    assert first is not None and _same(first.tree, _tree(1))


def test_arrays_may_be_donated_as_soon_as_save_returns(make: Callable[..., Checkpointer]) -> None:
    saving, tree = make(), {"w": jnp.arange(1_000_000.0)}
    saving.save(1, tree, {})
    tree = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)(tree)
    jax.block_until_ready(tree)
    restored = make().restore(tree) if saving.wait() is None else None
    assert restored is not None and np.array_equal(restored.tree["w"], np.arange(1_000_000.0, dtype=np.float32))


def test_a_run_without_checkpoints_has_none(make: Callable[..., Checkpointer]) -> None:
    checkpointer = make()
    assert checkpointer.restore(_tree()) is None and checkpointer.latest is None
    for read in (lambda: checkpointer.restore_params(_tree()["params"]), checkpointer.read_metadata):
        with pytest.raises(UserError, match="no checkpoint in"):
            read()


def test_due_and_saved_already(make: Callable[..., Checkpointer]) -> None:
    checkpointer = make()
    checkpointer.config = CheckpointConfig(every=10)
    assert not checkpointer.save(3, _tree(), {})
    assert checkpointer.save(3, _tree(), {}, force=True)
    assert not checkpointer.save(3, _tree(), {}, force=True)
    checkpointer.wait()
    assert checkpointer.save(10, _tree(), {})
    checkpointer.wait()
    assert checkpointer.steps() == [3, 10] and checkpointer.latest == 10


def test_metadata_are_read_without_the_arrays(make: Callable[..., Checkpointer]) -> None:
    checkpointer = make()
    tokenizer = "x" * 500_000
    checkpointer.save(5, _tree(), {"rows": 2**40, "tokenizer": {"model": tokenizer}, "rate": 1e-4})
    checkpointer.wait()
    shutil.rmtree(checkpointer.directory / "5" / "state")
    reader = CheckpointReader(checkpointer.directory)
    assert reader.read_metadata() == reader.read_metadata(5)
    assert reader.read_metadata() == {"rows": 2**40, "tokenizer": {"model": tokenizer}, "rate": 1e-4}


def test_weights_alone(make: Callable[..., Checkpointer]) -> None:
    saving = make()
    _save(saving, 1)
    reader = CheckpointReader(saving.directory)
    weights = _tree(0)["params"]
    assert _same(reader.restore_params(weights).tree, _tree(1)["params"])
    assert _same(reader.restore_params(weights, ema=True).tree, _tree(1)["ema"])
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), weights)
    cast = reader.restore_params(half).tree
    assert _same(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), _tree(1)["params"]))
    other = weights | {"b": jnp.zeros(9), "new": jnp.zeros(2), "layer": {"w": jnp.zeros((64, 25))}}
    with pytest.raises(UserError) as caught:
        reader.restore_params(other)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and lines[1] == "params/b is float32 [8] in the checkpoint and float32 [9] here"
    assert lines[2].endswith("float32 [64, 25] here; and 1 more")


def test_a_run_without_an_average_gives_its_weights(make: Callable[..., Checkpointer]) -> None:
    checkpointer, tree = make(), _tree(1) | {"ema": None}
    checkpointer.save(1, tree, {})
    checkpointer.wait()
    assert _same(checkpointer.restore_params(tree["params"], ema=True).tree, tree["params"])


# --------------------------------------------------------------------------------------------------------------- damage


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _replace(folder: Path, old: bytes, new: bytes) -> None:
    """Changes bytes wherever they stand in the files of a folder."""
    found = 0
    for path in _files(folder):
        data = path.read_bytes()
        if old in data:
            path.write_bytes(data.replace(old, new))
            found += 1
    assert found, "the leaf's bytes are not in any file"


@pytest.mark.parametrize("leaf", ["params/layer/w", *(f"kinds/{name}" for name in DTYPES), "opt/0", "keys"])
def test_one_flipped_bit_in_any_leaf_is_found(make: Callable[..., Checkpointer], said: list[str], leaf: str) -> None:
    _save(make(), 1, 2)
    tree: Any = _tree(2)
    for part in leaf.split("/"):
        tree = tree[int(part) if part.isdigit() else part]
    old = _raw(tree)
    new = bytearray(old)
    new[len(old) // 2] ^= 1
    step = Path(make().directory / "2")
    _replace(step / "state", old, bytes(new))
    checkpointer = make()
    restored = checkpointer.restore(_tree(0))
    assert restored is not None and restored.step == 1 and _same(restored.tree, _tree(1))
    kept = "kept as damaged-2, going on from checkpoint 1"
    assert said == [f"checkpoint 2 is damaged ({leaf} does not match its fingerprint): {kept}"]
    _save(checkpointer, 2)
    again = make().restore(_tree(0))
    assert again is not None and again.step == 2 and _folders(checkpointer) == {"1", "2", "damaged-2"}


def _truncate(step: Path) -> None:
    for path in _files(step / "state"):
        if path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated data": (_truncate, "state cannot be read"),
    "no data": (lambda step: [path.unlink() for path in _files(step / "state" / "d")], "state cannot be read"),
    "no state": (lambda step: shutil.rmtree(step / "state"), "state"),
    "no manifest": (lambda step: shutil.rmtree(step / "manifest"), "manifest is missing"),
    "no metadata": (lambda step: (step / "metadata" / "metadata").unlink(), "metadata is missing"),
    "half a manifest": (lambda step: _replace(step / "manifest", b"}}", b""), "manifest cannot be read"),
    "another number": (lambda step: _replace(step / "metadata", b"20", b"21"), "metadata does not match its checksum"),
    "tree description": (lambda step: (step / "state" / "_METADATA").write_bytes(b"\xff"), "state cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_falls_back(make: Callable[..., Checkpointer], said: list[str], kind: str) -> None:
    _save(make(), 1, 2)
    damage, words = DAMAGE[kind]
    damage(Path(make().directory / "2"))
    reader = CheckpointReader(make().directory, said.append)
    assert _same(reader.restore_params(_tree(0)["params"]).tree, _tree(1)["params"])
    assert _folders(reader) == {"1", "2"}, "a reader changes nothing"
    restored = make().restore(_tree(0))
    assert restored is not None and restored.step == 1 and _same(restored.tree, _tree(1))
    assert restored.metadata == {"rows": 10}
    assert len(said) == 2
    for line in said:
        assert line.startswith("checkpoint 2 is damaged (") and words in line and "\n" not in line


def test_random_damage_is_never_restored(make: Callable[..., Checkpointer], said: list[str], tmp_path: Path) -> None:
    _save(make(), 1, 2)
    folder, whole = tmp_path / "checkpoints", tmp_path / "whole"
    shutil.copytree(folder, whole)
    rng = random.Random(0)
    found = 0
    for _ in range(12):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        path = rng.choice([p for p in _files(folder / "2") if p.stat().st_size])
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        restored = make().restore(_tree(0))
        assert restored is not None and _same(restored.tree, _tree(restored.step))
        assert restored.metadata == {"rows": 10 * restored.step}
        found += restored.step == 1
    assert len(said) == found > 0


def test_nothing_good_is_no_fresh_start(make: Callable[..., Checkpointer]) -> None:
    checkpointer = make()
    _save(checkpointer, 1, 2)
    for step in ("1", "2"):
        _truncate(Path(checkpointer.directory / step))
    for _ in range(2):  # nothing is moved, so the second try does not find an empty folder either
        with pytest.raises(UserError, match=r"(?s)2 is damaged.*1 is damaged") as caught:
            make().restore(_tree(0))
        assert len(str(caught.value).splitlines()) <= 3


def test_a_foreign_folder_is_no_step(make: Callable[..., Checkpointer], said: list[str]) -> None:
    checkpointer = make()
    _save(checkpointer, 1)
    (checkpointer.directory / "3").mkdir()
    (checkpointer.directory / "04").mkdir()
    (checkpointer.directory / "notes").mkdir()
    assert checkpointer.latest == 1 and checkpointer.steps() == [1]
    restored = checkpointer.restore(_tree(0))
    assert restored is not None and restored.step == 1
    assert len(said) == 1 and "/3 is ignored" in said[0]
    _save(checkpointer, 3)
    assert checkpointer.latest == 3 and "damaged-3" in _folders(checkpointer)


def test_only_a_foreign_folder_is_a_fresh_start(make: Callable[..., Checkpointer], said: list[str]) -> None:
    checkpointer = make()
    (checkpointer.directory / "3").mkdir()
    assert checkpointer.restore(_tree(0)) is None and len(said) == 1


def test_a_step_of_another_past_is_not_overwritten(make: Callable[..., Checkpointer], said: list[str]) -> None:
    _save(make(), 1, 2)
    checkpointer = make()
    assert checkpointer.restore(_tree(0), step=1) is not None
    assert checkpointer.save(2, _tree(5), {})
    checkpointer.wait()
    assert said == ["there was a checkpoint 2 already: kept as replaced-2"]
    restored = make().restore(_tree(0))
    assert restored is not None and _same(restored.tree, _tree(5))


def test_too_little_memory_or_no_permission_is_not_damage(
    make: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(make(), 1, 2)

    def failing(error: Exception) -> Any:
        class Handler:
            def restore(self, *args: Any, **kwargs: Any) -> None:
                raise error

        return lambda: Handler()

    monkeypatch.setattr(checkpoint_reader, "array_handler", failing(ValueError("RESOURCE_EXHAUSTED: out of memory")))
    with pytest.raises(ValueError, match="out of memory"):
        make().restore(_tree(0))
    monkeypatch.setattr(checkpoint_reader, "array_handler", failing(PermissionError(13, "no")))
    with pytest.raises(StorageError, match="Permission denied"):
        make().restore(_tree(0))
    assert make().steps() == [1, 2]


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_another_dtype_or_prng_is_refused_unless_accepted(make: Callable[..., Checkpointer]) -> None:
    _save(make(), 1)
    half = _tree(0)
    half["params"]["b"] = half["params"]["b"].astype(jnp.bfloat16)
    with pytest.raises(UserError, match=r"params/b is float32 \[8\] in the checkpoint and bfloat16 \[8\] here"):
        make().restore(half)
    restored = make(accept=("dtype",)).restore(half)
    assert restored is not None and restored.tree["params"]["b"].dtype == jnp.bfloat16
    assert np.all(np.asarray(restored.tree["params"]["b"], np.float32) == 1)

    other = _tree(0, impl="rbg")
    with pytest.raises(UserError, match=r"key is .*threefry2x32 keys.* in the checkpoint and .*rbg keys.* here"):
        make().restore(other)
    keys = [make(accept=("prng",)).restore(other) for _ in range(2)]
    assert all(k is not None and jax.random.key_impl(k.tree["key"]) == "rbg" for k in keys)
    assert keys[0] is not None and keys[1] is not None and _same(keys[0].tree, keys[1].tree)
    assert make().steps() == [1], "what does not fit is not damaged"


def test_another_format_is_refused(make: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    _save(make(), 1)
    with pytest.raises(UserError, match="format 99"):
        make().restore(_tree(0))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"every": 0}, "every"),
        ({"keep": 0}, "keep"),
        ({"keep_every": 150}, "keep_every"),
        ({"accept": ("x",)}, "accept"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{key}"):
        CheckpointConfig(**config)


# ------------------------------------------------------------------------------------------------ retention and commits


def test_the_newest_and_the_milestones_are_kept(make: Callable[..., Checkpointer]) -> None:
    checkpointer = make(keep=2, keep_every=3)
    _save(checkpointer, *range(1, 9))
    assert checkpointer.steps() == [3, 6, 7, 8]
    assert _folders(checkpointer) == {"3", "6", "7", "8"}


def test_damaged_steps_do_not_count_among_the_newest(make: Callable[..., Checkpointer]) -> None:
    checkpointer = make(keep=2)
    _save(checkpointer, 1, 2)
    shutil.rmtree(checkpointer.directory / "2" / "manifest")
    _save(checkpointer, 3)
    assert checkpointer.steps() == [1, 3]


def test_leftovers_of_a_killed_process_are_cleared(make: Callable[..., Checkpointer]) -> None:
    checkpointer = make()
    _save(checkpointer, 1)
    for name in ("2.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", ".trash/manifest", "damaged-7/state"):
        (checkpointer.directory / name).mkdir(parents=True)
    assert checkpointer.latest == 1
    assert _folders(make()) == {"1", "damaged-7"}


def test_object_stores_commit_by_a_marker(make: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checkpoint, steps):
        monkeypatch.setattr(module, "is_local", lambda path: False)
    checkpointer = make(keep=2)
    _save(checkpointer, 1, 2, 3)
    assert checkpointer.steps() == [2, 3] and _folders(checkpointer) == {"2", "3"}
    (checkpointer.directory / "3" / steps.COMMITTED).unlink()  # as killed before it was written
    assert checkpointer.latest == 2
    restored = make().restore(_tree(0))
    assert restored is not None and restored.step == 2
    assert _folders(checkpointer) == {"2"}


def test_a_full_disk_is_told_and_never_the_latest(make: Callable[..., Checkpointer]) -> None:
    checkpointer = make()
    _save(checkpointer, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=500_000))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))  # a file that cannot grow, as on a full disk
    try:
        checkpointer.save(2, big, {})
        with pytest.raises(StorageError) as caught:
            for _ in range(200):
                time.sleep(0.05)
                checkpointer.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(caught.value) == f"cannot save checkpoint 2 in {checkpointer.directory}: File too large"
    assert checkpointer.latest == 1 and checkpointer.steps() == [1]
    checkpointer.check()  # told once
    _save(checkpointer, 2)
    assert checkpointer.latest == 2


def test_a_commit_that_is_not_whole_is_told(make: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = make()
    monkeypatch.setattr(Checkpointer, "_problem", lambda self, step: "manifest is missing")
    checkpointer.save(1, _tree(1), {})
    with pytest.raises(StorageError, match=r"checkpoint 1 .* is not whole: manifest is missing"):
        checkpointer.wait()


def test_nothing_is_pickled(make: Callable[..., Checkpointer]) -> None:
    checkpointer = make()
    _save(checkpointer, 1)
    for path in _files(Path(checkpointer.directory)):
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), path
        assert path.suffix not in (".pkl", ".pickle")
    sealed = json.loads((checkpointer.directory / "1" / "metadata" / "metadata").read_text())
    assert sealed["content"] == {"rows": 10}
