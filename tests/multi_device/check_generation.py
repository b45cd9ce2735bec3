"""Generation on layouts of eight devices gives what one device gives, for numbers of prompts that no mesh divides."""

import jax
import numpy as np

from lm_jax.generation.decode import generate
from lm_jax.generation.sampling import SamplingConfig
from lm_jax.sharding import MeshConfig
from tests.multi_device import layouts
from tests.support import tiny

C = tiny.config(heads=16, kv_heads=8, head_dim=4, feed_forward_dim=64)
PARAMS = tiny.parameters(C)
PROMPTS = [list(range(40)), [1, 2, 3], [9]]
DRAWN = SamplingConfig(temperature=0.7, top_k=10, top_p=0.9)

assert len(jax.devices()) == 8
expected = generate(PARAMS, PROMPTS, c=C, max_tokens=8, sampling=DRAWN, seed=1)
assert len(expected) == 3 and all(len(row) == 8 for row in expected)
for config in (MeshConfig(data=1, fsdp=8), MeshConfig(data=2, sequence=2, tensor=2)):
    mesh = layouts.mesh_of(config)
    params = layouts.place_params(PARAMS, C, mesh)
    with jax.set_mesh(mesh):  # as in the midst of training
        assert generate(params, PROMPTS, c=C, max_tokens=8, sampling=DRAWN, seed=1) == expected, config
    assert generate(params, PROMPTS[:1], c=C, max_tokens=8, sampling=DRAWN, seed=1) == expected[:1], config
    np.testing.assert_array_equal(params["embedding"], PARAMS["embedding"])  # still where it was
    print(config, flush=True)
