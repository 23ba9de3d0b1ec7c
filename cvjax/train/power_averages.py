"""Averages of the parameters of any width, chosen after the training.

T. Karras et al.: Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2,
https://arxiv.org/abs/2312.02696), section 3. An average with the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    tau in [0, t],

forgets the random beginning whatever the length of the run. Its width is the standard deviation of
the profile as a share of t. Two widths are tracked (`tracked`, around any optimizer); each
checkpoint keeps both, and from these snapshots every other width is a linear combination, found by
least squares between the profiles (`averaged_params`).
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from cvjax.checks import check_positive
from cvjax.errors import InputError
from cvjax.train.checkpoint_files import damage, flatten, read_arrays, read_metadata, step_folders
from cvjax.train.state import PyTree

KEY = "power_averages"


def exponent(width: float) -> float:
    """gamma of a width in (0, 0.288): the inverse of `width_of` (appendix C.2, algorithm 2).

    Raises InputError for other widths; 0.289 would be gamma = 0, the plain mean.
    """
    if not 0 < width < width_of(0.0):
        raise InputError(f"width is {width}; it must be above 0 and below {width_of(0.0):.3f}")
    square = width**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def width_of(gamma: float) -> float:
    """The standard deviation of the profile, as a share of t (equation 123)."""
    return float(np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2))


def tracked(
    learning_rate: Any, *, transform: Callable[..., Any], widths: Sequence[float] = (0.05, 0.1)
) -> optax.GradientTransformation:
    """The optimizer `transform(learning_rate=...)` that also averages what it is shown.

    As `Optimizer.transform`, in a config:

        transform=dict(type="train.power_averages.tracked", transform=dict(type="optax.adam"))

    with `keep` as large as the number of checkpoints. The averages are part of the optimizer's
    state. They hold the parameters before each update but the first: those at the very beginning
    are random, and those after the last update would be for the next to see.
    """
    if not widths:
        raise InputError("tracked: widths is empty; there must be one, better two")
    check_positive(**{f"tracked: widths[{i}]": width for i, width in enumerate(widths)})
    gammas = {str(width): exponent(width) for width in widths}

    def start(params: PyTree) -> PyTree:
        # In bfloat16 a small share of a difference would be rounded to nothing.
        kept = lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
        averages = {name: jax.tree.map(kept, params) for name in gammas}
        return {KEY: {"count": jnp.zeros((), jnp.int32), **averages}}

    def average(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        count = state[KEY]["count"]
        new = {"count": count + 1}
        for name, gamma in gammas.items():
            # 1 - beta of equation 127: (1 - 1 / count)^(gamma + 1) is kept, of the first nothing.
            # After a million updates the power has few digits of what it lacks to 1.
            kept = jnp.log1p(-1 / jnp.maximum(count, 2)) * (gamma + 1)
            share = jnp.where(count > 1, -jnp.expm1(kept), 1.0)
            new[name] = jax.tree.map(
                lambda old, now, share=share: (old + share * (now - old)).astype(old.dtype),
                state[KEY][name], params,
            )  # fmt: skip
        return updates, {KEY: new}

    return optax.chain(
        transform(learning_rate=learning_rate), optax.GradientTransformation(start, average)
    )


def combination(
    counts: ArrayLike, widths: ArrayLike, count: float, width: float
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The factors, [n], of n snapshots whose sum is nearest to another average (algorithm 3).

    They sum to 1, so that what did not change stays as it is: the nearest of all sums need not,
    where few snapshots are far from the profile.

    Args:
      counts: [n], how many parameters each snapshot is an average of.
      widths: [n], of their profiles.
      count, width: of the average that is wanted.
    """
    t = np.asarray(counts, np.float64)
    gamma = np.array([exponent(each) for each in np.asarray(widths, np.float64)])
    matrix = _overlap(t[:, None], gamma[:, None], t[None], gamma[None])
    # Snapshots may nearly depend on each other: the smallest solution.
    factors = np.linalg.lstsq(matrix, _overlap(t, gamma, count, exponent(width)), rcond=1e-12)[0]
    return factors / factors.sum()


def averaged_params(workdir: str | os.PathLike, group: str, params: PyTree, width: float) -> PyTree:
    """The average with that width, at the newest checkpoint of a run with `tracked`.

    Args:
      workdir: of the run, with all its checkpoints.
      group: of parameters.
      params: a pytree of arrays or shapes: what the group is like. What was frozen did not change,
        and has no average.
      width: standard deviation of the profile, as a share of the run.

    Raises:
      InputError: no checkpoint with tracked averages, or one of other params.
    """
    # Of this group alone: another's optimizer may have taken more steps.
    pattern = re.compile(rf"opt_state/{re.escape(group)}/.*?{KEY}/(?:(count)|([^/]+)/(.*))")
    counts, widths, snapshots = [], [], []
    for _, folder in sorted(step_folders(Path(workdir) / "checkpoints").items()):
        if damage(folder) is not None:
            continue
        found: dict[str, dict[str, str]] = {}
        counter = ""
        for path in read_metadata(folder).arrays:
            if match := pattern.fullmatch(path):
                if match[1]:
                    counter = path
                else:
                    found.setdefault(match[2], {})[match[3]] = path
        for name, paths in found.items():
            arrays = read_arrays(folder, [counter, *paths.values()])
            counts.append(int(arrays[counter]) - 1)
            widths.append(float(name))
            snapshots.append({rest: np.asarray(arrays[path]) for rest, path in paths.items()})
            newest = folder
    usable = [number for number, count in enumerate(counts) if count > 0]
    if not usable:
        raise InputError(
            f"{workdir} has no checkpoint with averages; train with train.power_averages.tracked"
        )
    counts, widths, snapshots = (
        [column[i] for i in usable] for column in (counts, widths, snapshots)
    )
    factors = combination(counts, widths, max(counts), width)
    leaves = []
    for name, leaf in flatten(params).items():
        frozen = f"params/{group}/{name}"
        if name in snapshots[-1]:
            parts = np.stack([snapshot[name].astype(np.float64) for snapshot in snapshots])
            found = np.tensordot(factors, parts, 1)
        elif frozen in read_metadata(newest).arrays:
            found = np.asarray(read_arrays(newest, [frozen])[frozen])
        else:
            raise InputError(f"{newest} has no {frozen}: it is of another model")
        if found.shape != leaf.shape:
            raise InputError(
                f"{newest}: {frozen} is {list(found.shape)}; params say {list(leaf.shape)}"
            )
        leaves.append(found.astype(leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _overlap(t: ArrayLike, gamma: ArrayLike, other: ArrayLike, other_gamma: ArrayLike) -> Any:
    """The integral of the product of two profiles (equation 144)."""
    earlier, later = np.minimum(t, other), np.maximum(t, other)
    of_later = np.where(np.asarray(t) > other, gamma, other_gamma)
    ratio = (earlier / later) ** of_later / later
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * ratio
