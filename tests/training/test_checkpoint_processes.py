"""Checkpoints in processes of their own: other meshes, and kills at any moment."""

from pathlib import Path

from etils import epath

from lm_jax.training.checkpoint_reader import CheckpointReader
from tests.support.processes import run_python

_MESHES = """
import sys, jax, numpy as np, jax.numpy as jnp
from etils import epath
from lm_jax.params import Normal, ParamSpec, stack
from lm_jax.sharding import MeshConfig, abstract, make_mesh, one_device_mesh, on_mesh
from lm_jax.training.checkpoint import CheckpointConfig, Checkpointer

specs = stack({"w": ParamSpec((8, 16), ("embed", "feed_forward"), Normal(1.0))}, 2)
specs["table"] = ParamSpec((16, 8), ("vocab", "embed"), Normal(1.0), fan_in=())


def make(p):
    return {"params": p, "half": jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), "key": jax.random.key(3)}


def state(mesh):
    with jax.set_mesh(mesh):
        return on_mesh(mesh, jax.eval_shape(make, abstract(specs, mesh)))


first = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
with jax.set_mesh(first):
    shapes = abstract(specs, first)
    numbers = lambda shape: np.random.default_rng(0).normal(size=shape).astype("f")
    params = jax.tree.map(lambda a: jax.device_put(numbers(a.shape), a.sharding), shapes)
    tree = jax.jit(make)(params)
    checkpoints = Checkpointer(epath.Path(sys.argv[1]), CheckpointConfig(every=1))
    checkpoints.save(1, tree, {"rows": 8})
    checkpoints.wait()
for mesh in (make_mesh(MeshConfig(data=1, fsdp=8)), make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)), one_device_mesh()):
    wanted = state(mesh)
    with jax.set_mesh(mesh):
        restored = checkpoints.restore(wanted)
    for want, a, b in zip(*map(jax.tree.leaves, (wanted, tree, restored.tree)), strict=True):
        assert b.sharding == want.sharding, (b.sharding, want.sharding)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    print("restored", dict(mesh.shape))
checkpoints.close()
"""


def test_restores_onto_other_meshes(tmp_path: Path) -> None:
    done = run_python(_MESHES, str(tmp_path / "c"), devices=8)
    assert done.stdout.count("restored") == 3 and done.stderr == ""


_KILLED = """
import itertools, os, random, signal, sys, time
import jax, jax.numpy as jnp
from etils import epath
from lm_jax.training.checkpoint import CheckpointConfig, Checkpointer

SIZE = 100_000


def save_on(told):
    checkpoints = Checkpointer(epath.Path(sys.argv[1]), CheckpointConfig(every=1, keep=2))
    restored = checkpoints.restore({"w": jnp.zeros(SIZE), "n": jnp.int32(0)})
    start = restored.step if restored else 0
    if restored:
        assert int(restored.tree["n"]) == start and float(restored.tree["w"].max()) == start == restored.metadata["n"]
    os.write(told, f"from {start}\\n".encode())
    for n in itertools.count(start + 1):
        checkpoints.save(n, {"w": jnp.full(SIZE, float(n)), "n": jnp.int32(n)}, {"n": n})
        checkpoints.wait()
        os.write(told, f"committed {n}\\n".encode())


rng, committed = random.Random(0), 0
for _ in range(int(sys.argv[2])):
    read, write = os.pipe()
    child = os.fork()  # nothing of jax runs in this process: only its import is shared
    if not child:
        save_on(write)
    os.close(write)
    with os.fdopen(read) as lines:
        said = [lines.readline() for _ in range(2)]
        time.sleep(rng.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said += lines.readlines()
    start = int(said[0].split()[1])
    # A step may be committed in the moment before the line that says so.
    assert committed <= start <= committed + 1, (committed, said)
    committed = int(said[-1].split()[1])
    assert committed > start, said
print("committed", committed)
"""


def test_a_kill_at_any_moment_loses_no_committed_step(tmp_path: Path) -> None:
    done = run_python(_KILLED, str(tmp_path / "c"), "4", devices=1)
    committed = int(done.stdout.split()[1])
    latest = CheckpointReader(epath.Path(tmp_path / "c")).latest
    assert latest is not None and committed <= latest <= committed + 1 and committed >= 4
    assert "damaged" not in done.stderr
