"""What a run minimises, as two functions.

`weights(batch)`: the denominators of the objective's terms, from the batch alone. `terms(...)`: the sums of its terms
on a micro-batch. The step divides by the weights of the whole global batch, so accumulation over micro-batches and
uneven masks are exact on any layout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Terms = dict[str, Array]


class Objective(NamedTuple):
    """What the step minimises: the sum over terms of `terms / weights`, each a dict of float32 scalars by the term's
    name.

    `terms(params, frozen, extra, batch, key)` gives the sums and the new `extra`.
    """

    weights: Callable[[Any], Terms]
    terms: Callable[[Any, Any, Any, Any, Array], tuple[Terms, Any]]
