"""The one train step: every objective in its order, then the moving averages."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation

from cvjax.checks import check_between
from cvjax.errors import InputError, nearest
from cvjax.train.state import PyTree, TrainState
from cvjax.train.task import Batch, Loss, Metrics, Task, mean

Decay = float | Callable[[jax.Array], jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def initial_state(
    task: Task,
    batch: Batch,
    rng: jax.Array,
    optimizers: Mapping[str, GradientTransformation],
    ema: Mapping[str, Decay],
) -> TrainState:
    """The state before the first step; jit it."""
    params, model_state = task.init(rng, batch)
    for group in ema:
        if group not in params:
            raise InputError(f"ema: there is no group {group!r}{nearest(group, params)}")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=rng,
        params=params,
        opt_state={name: opt.init(params[name]) for name, opt in optimizers.items()},
        model_state=model_state,
        ema={group: start_of_average(params[group]) for group in ema},
    )


def start_of_average(params: PyTree) -> PyTree:
    """A copy of parameters, in float32 at least: half precision rounds small moves to nothing.

    Were it the same buffer, donating the state would donate it twice.
    """
    return jax.tree.map(lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), params)


def check_decay(group: str, decay: float | Decay) -> None:
    """Raises InputError unless an average's decay is a function of the step, or in [0, 1)."""
    is_number = isinstance(decay, int | float) and not isinstance(decay, bool)
    if not (callable(decay) or (is_number and 0 <= decay < 1)):
        raise InputError(f"ema of {group} is {decay!r}; it must be in [0, 1), or a function")


def make_train_step(
    task: Task,
    optimizers: Mapping[str, GradientTransformation],
    ema: Mapping[str, Decay] | None = None,
    axis_name: str | None = None,
    micro_batches: int = 1,
) -> TrainStep:
    """Returns the pure `train_step(state, batch) -> (state, metrics)`; nothing is compiled yet.

    A step whose loss or gradient is not finite changes nothing but the step count: it is
    reported in the metrics as `nonfinite/<group>/loss` or `nonfinite/<group>/gradient`.
    The moving average of a group is `ema <- decay * ema + (1 - decay) * params`, taken only when
    an update was really applied; a decay may be a function of the number of micro-batches.

    With `axis_name` the step runs inside `pmap`: gradients, batch statistics and metrics are
    averaged over that axis, and each device draws its own random numbers. Under `jit` nothing of
    the kind is needed: the batch is global.

    With `micro_batches` each gradient is taken of that many parts of the batch, one after another,
    and averaged with the numbers of valid examples as weights: that of the whole batch, if a loss
    is a mean over the valid examples, for the memory of one part. Batch statistics are taken of
    each part in turn.
    """
    ema = ema or {}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        if axis_name:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        new, metrics, finite, applied = state, {}, jnp.bool_(True), {}

        for number, (group, loss) in enumerate(task.objectives):
            key = jax.random.fold_in(rng, number)

            take_gradient = _gradient if micro_batches == 1 else _gradient_by_parts
            (value, (model_state, reported)), gradient = take_gradient(
                loss, group, new, batch, key, micro_batches
            )
            if axis_name:
                value, gradient, model_state = _mean_over(axis_name, (value, gradient, model_state))
                reported = jax.lax.psum(reported, axis_name)
            try:  # some take the value of the loss, too, and a few even more
                updates, opt_state = optax.with_extra_args_support(optimizers[group]).update(
                    gradient, new.opt_state[group], new.params[group], value=value
                )
            except (TypeError, ValueError) as error:
                raise InputError(f"the optimizer of {group!r} does not fit: {error}") from error
            is_update = _is_update(new.opt_state[group], opt_state)
            applied[group] = applied.get(group, False) | is_update
            new = new.replace(
                params={**new.params, group: optax.apply_updates(new.params[group], updates)},
                opt_state={**new.opt_state, group: opt_state},
                model_state=model_state,
            )
            loss_is_finite, gradient_is_finite = jnp.isfinite(value), _all_finite(gradient)
            finite &= _all_finite((value, gradient))
            reported = {
                **reported,
                f"nonfinite/{group}/loss": mean(~loss_is_finite),
                f"nonfinite/{group}/gradient": mean(~gradient_is_finite),
            }
            for name, metric in reported.items():
                metrics[name] = metrics[name].merge(metric) if name in metrics else metric

        for group, decay in ema.items():
            weight = jnp.float32(decay(state.step) if callable(decay) else decay)
            weight = jnp.where(applied.get(group, False), weight, 1.0)
            averaged = jax.tree.map(
                lambda old, now, weight=weight: (old + (1 - weight) * (now - old)).astype(
                    old.dtype
                ),
                new.ema[group],
                new.params[group],
            )
            new = new.replace(ema={**new.ema, group: averaged})

        # The key never changes, and only arrays of numbers can be chosen between.
        kept = new.replace(rng=None, step=None)
        kept = jax.tree.map(
            lambda now, old: jnp.where(finite, now, old), kept, state.replace(rng=None, step=None)
        )
        return kept.replace(rng=state.rng, step=state.step + 1), metrics

    return train_step


def _gradient(
    loss: Loss, group: str, state: TrainState, batch: Batch, rng: jax.Array, _: int = 1
) -> tuple[tuple[jax.Array, tuple[PyTree, Metrics]], PyTree]:
    """((loss, (model_state, metrics)), gradient with respect to the parameters of the group)."""

    def loss_of_group(part: PyTree) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        return loss({**state.params, group: part}, state, batch, rng)

    return jax.value_and_grad(loss_of_group, has_aux=True)(state.params[group])


def _gradient_by_parts(
    loss: Loss, group: str, state: TrainState, batch: Batch, rng: jax.Array, parts: int
) -> tuple[tuple[jax.Array, tuple[PyTree, Metrics]], PyTree]:
    """The same by `lax.scan` over parts of the batch."""

    # Part i has the rows i, i + parts, ...: of every device's rows the same number.
    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    examples = jnp.maximum(jnp.sum(batch["valid"]), 1)

    def one(model_state: PyTree, number: jax.Array, part: Batch) -> tuple[PyTree, PyTree, PyTree]:
        (value, (model_state, metrics)), gradient = _gradient(
            loss, group, state.replace(model_state=model_state), part,
            jax.random.fold_in(rng, number),
        )  # fmt: skip
        share = jnp.sum(part["valid"]) / examples
        # A mean over no valid example is NaN, and 0 times that would be NaN, too. In float32 at
        # least: many small shares of half precision would be rounded to nothing.
        shares = jax.tree.map(lambda x: jnp.where(share > 0, share * x, 0), (value, gradient))
        return model_state, metrics, shares

    def add(carry: PyTree, numbered: tuple[jax.Array, Batch]) -> tuple[PyTree, None]:
        model_state, *before = carry
        model_state, *now = one(model_state, *numbered)
        return (model_state, *jax.tree.map(jnp.add, before, now)), None

    pieces = jnp.arange(parts), jax.tree.map(cut, batch)
    shapes = jax.eval_shape(one, state.model_state, *jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1:])
    (model_state, metrics, (value, gradient)), _ = jax.lax.scan(
        add, (state.model_state, *zeros), pieces
    )
    gradient = jax.tree.map(lambda x, like: x.astype(like.dtype), gradient, state.params[group])
    return (value, (model_state, metrics)), gradient


def warmed_up_decay(step: jax.Array, *, decay: float) -> jax.Array:
    """A moving average's decay that starts low: min(decay, (1 + step) / (10 + step)).

    Without it a short run samples what is left of its random beginning (the rule of
    tf.train.ExponentialMovingAverage). `functools.partial` binds the decay.
    """
    check_between(0, 1, decay=decay)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def _is_update(old: PyTree, new: PyTree) -> jax.Array | bool:
    """Whether an optimizer really moved the parameters, or only collected a micro-batch."""
    done = [
        [one.gradient_step for one in jax.tree.leaves(state, is_leaf=_counts) if _counts(one)]
        for state in (old, new)
    ]
    return jnp.any(jnp.array(done[0]) != jnp.array(done[1])) if done[0] else True


def _counts(state: PyTree) -> bool:
    return isinstance(state, optax.MultiStepsState)


def _all_finite(tree: PyTree) -> jax.Array:
    # Not all(array of flags): XLA makes of it one "and" for each leaf, fuses all of them into each
    # update that depends on them, and the program grows with the square of the number of leaves.
    largest = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.isfinite(jnp.array(largest)))


def _mean_over(axis_name: str, tree: PyTree) -> PyTree:
    """The mean over devices; counters, which are equal on all of them, stay integers."""
    return jax.tree.map(
        lambda x: (
            jax.lax.pmean(x, axis_name)
            if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
            else jax.lax.pmax(x, axis_name)
        ),
        tree,
    )
