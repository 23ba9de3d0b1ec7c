"""Everything that a run carries from one step to the next, as one pytree."""

from typing import Any

import flax.struct
import jax

PyTree = Any
Params = dict[str, PyTree]


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
      step: int32 scalar, the number of micro-batches seen; those of
        one loop (`accumulate_how="scan"`) count once.
      rng: a typed PRNG key made from the seed. It never changes: the randomness of a step is
        `fold_in(rng, step)`, so that a resumed run draws the same numbers.
      params: what is optimized, {group: pytree}; each group has its own optimizer.
      opt_state: {group: state of that group's `optax.MultiSteps`}.
      model_state: what changes without a gradient (batch statistics, queues, codebooks);
        {} when there is none.
      ema: exponential moving average of the params, {group: pytree} of the groups that have
        one, in float32 at least; {} when there is none.
    """

    step: jax.Array
    rng: jax.Array
    params: Params
    opt_state: dict[str, PyTree]
    model_state: PyTree
    ema: Params

    @property
    def averaged_params(self) -> Params:
        """The params, with those groups replaced that have a moving average."""
        return {**self.params, **self.ema}
