"""Optimizers: any optax optimizer and schedule, with rules by parameter path around them."""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax import GradientTransformation, Schedule

from cvjax.checks import check_between, check_choice, check_choices, check_count, check_positive
from cvjax.errors import InputError, nearest
from cvjax.train.state import PyTree

Rules = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Optimizer:
    """An optax optimizer with a schedule, clipping, decay and freezing rules, and accumulation.

    Rules are pairs (pattern, value). A pattern is a regular expression that must match the whole
    path of a parameter ("stage1_0/conv1/kernel"); the first that matches decides. A rule
    that matches nothing and a parameter that no rule covers are errors.

    Attributes:
      transform: what makes the optax optimizer when called with `learning_rate`, say
        `optax.adamw` or `functools.partial(optax.sgd, momentum=0.9)`.
      learning_rate: a number, an optax schedule, or the `functools.partial` of what makes one
        (so it comes from a config); `decay_steps` or `transition_steps` that are not given
        become the number of updates of the run, less the warm-up; within `optax.join_schedules`
        that of the part from one boundary to the next.
      warmup_steps: updates over which the rate first rises linearly from 0.
      clip_norm: gradients whose global norm is larger are scaled down to it.
      weight_decay: rules with the decay of each parameter, decoupled from the gradient: each
        update also subtracts learning_rate * decay * parameter (Loshchilov and Hutter 2019).
      freeze: rules with True where a parameter shall not change.
      accumulate: micro-batches whose mean gradient makes one update.
      accumulate_how: "multi_steps" (`optax.MultiSteps`: each micro-batch is a step) or "scan" (all
        are one step, which loops over them: see `experiments/gradient_accumulation`).
    """

    transform: Callable[..., GradientTransformation] = optax.adamw
    learning_rate: float | Schedule | Callable[..., Schedule] = 1e-3
    warmup_steps: int = 0
    clip_norm: float | None = None
    weight_decay: Rules | None = None
    freeze: Rules | None = None
    accumulate: int = 1
    accumulate_how: str = "multi_steps"

    def __post_init__(self):
        if not callable(self.transform):
            raise InputError(
                f"optimizer.transform is {self.transform!r}; it must be what makes an optimizer, "
                "such as optax.adamw"
            )
        check_count(1, **{"optimizer.accumulate": self.accumulate})
        check_count(0, **{"optimizer.warmup_steps": self.warmup_steps})
        check_choices(self, accumulate_how=("multi_steps", "scan"))
        check_rules(self.weight_decay, "optimizer.weight_decay")
        check_rules(self.freeze, "optimizer.freeze")
        for pattern, value in self.weight_decay or ():
            check_between(0, math.inf, **{f"optimizer.weight_decay of {pattern!r}": value})
        for pattern, value in self.freeze or ():  # "no" would be true
            check_choice((False, True), **{f"optimizer.freeze of {pattern!r}": value})
        if self.clip_norm is not None:
            check_positive(**{"optimizer.clip_norm": self.clip_norm})
        if not callable(self.learning_rate):
            check_between(0, math.inf, **{"optimizer.learning_rate": self.learning_rate})
        for name, value in getattr(self.learning_rate, "keywords", {}).items():
            if isinstance(value, int | float) and not value >= 0:
                raise InputError(
                    f"optimizer.learning_rate.{name} is {value}; it cannot be negative"
                )

    def schedule(self, steps: int) -> Schedule:
        """The learning rate by number of updates done, for a run of `steps` updates."""
        rate = self.learning_rate
        rest = max(steps - self.warmup_steps, 1)
        if not callable(rate):
            schedule = optax.constant_schedule(rate)
        else:
            schedule = _complete(rate, rest)
        if not self.warmup_steps:
            return schedule
        rise = optax.linear_schedule(0.0, schedule(0), self.warmup_steps)
        return optax.join_schedules([rise, schedule], [self.warmup_steps])

    def build(self, params: PyTree, steps: int) -> GradientTransformation:
        """The optax transformation for these `params` (arrays or shapes) over `steps` updates."""
        schedule = self.schedule(steps)
        transform = self.transform
        if self.weight_decay is not None:
            transform = _without_own_decay(transform)
        chain = [optax.clip_by_global_norm(float(self.clip_norm))] if self.clip_norm else []
        try:
            chain.append(transform(learning_rate=schedule))
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer.transform: {error}") from error
        if self.weight_decay is not None:
            decays = by_path(self.weight_decay, params, "optimizer.weight_decay")
            for value in sorted(set(decays.values()) - {0.0}):
                chain.append(_decay(schedule, value, decays))
        optimizer = optax.chain(*chain)
        if self.freeze is not None:
            frozen = by_path(self.freeze, params, "optimizer.freeze")
            labels = jax.tree_util.tree_map_with_path(
                lambda path, _: "frozen" if frozen[path_name(path)] else "trained", params
            )
            parts = {"trained": optimizer, "frozen": optax.set_to_zero()}
            optimizer = optax.partition(parts, labels)
        if self.accumulate > 1 and self.accumulate_how == "multi_steps":
            optimizer = optax.MultiSteps(optimizer, self.accumulate).gradient_transformation()
        return optimizer


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as "a/b/0"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_rules(rules: Any, field: str) -> None:
    """Raises InputError unless `rules` are pairs of a regular expression and a value, or None."""
    wanted = f"{field} is {rules!r}; it must be pairs (pattern, value), such as (('.*', value),)"
    if rules is None:
        return
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise InputError(wanted)
    for rule in rules:
        is_pair = isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2
        if not (is_pair and isinstance(rule[0], str)):
            raise InputError(wanted)
        try:
            re.compile(rule[0])
        except re.error as error:
            raise InputError(f"{field}: {rule[0]!r} is no regular expression: {error}") from error


def by_path(rules: Rules, params: PyTree, field: str = "rules") -> dict[str, Any]:
    """{path: value of the first rule whose pattern matches the whole path} for all parameters.

    Raises InputError for a rule that matches no path, and for a path that no rule covers.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise InputError(f"{field}: {pattern!r} matches no parameter{nearest(pattern, names)}")
    values = {}
    for name in names:
        matching = [value for pattern, value in rules if re.fullmatch(pattern, name)]
        if not matching:
            raise InputError(f"{field}: no rule covers {name}; end with ('.*', value) for the rest")
        values[name] = matching[0]
    return values


def optimizers_by_group(
    optimizer: Any, params: Mapping[str, PyTree], groups: Sequence[str], steps: int
) -> dict[str, GradientTransformation]:
    """One optax transformation for each group, from one for all or a dictionary of them.

    Each may be an `Optimizer` or an optax transformation. `groups` are those of the objectives,
    in which one may stand several times, `steps` the updates of the run.
    """
    updates = updates_by_group(optimizer, groups, steps)
    groups = list(dict.fromkeys(groups))
    if not isinstance(optimizer, Mapping):
        optimizer = dict.fromkeys(groups, optimizer)
    for group in optimizer:
        if group not in groups:
            raise InputError(f"optimizer: no objective trains {group!r}{nearest(group, groups)}")
    built = {}
    for group in groups:
        if group not in params:
            known = nearest(group, params)
            raise InputError(f"the task has an objective for {group!r} but no such params{known}")
        one = optimizer.get(group)
        if isinstance(one, Optimizer):
            one = one.build(params[group], updates[group])
        elif isinstance(one, optax.MultiSteps):
            one = one.gradient_transformation()
        elif not isinstance(one, GradientTransformation):
            raise InputError(
                f"optimizer: {group!r} needs an Optimizer or an optax transformation, found "
                f"{type(one).__name__}"
            )
        built[group] = one
    return built


def updates_by_group(optimizer: Any, groups: Sequence[str], steps: int) -> dict[str, int]:
    """How many updates each group takes during `steps` of the run.

    More than these where it has several objectives, or accumulates less than another group.
    """
    steps *= micro_batches(optimizer)[0]
    updates = {}
    for group in groups:
        one = optimizer.get(group) if isinstance(optimizer, Mapping) else optimizer
        loops = isinstance(one, Optimizer) and one.accumulate_how == "multi_steps"
        updates[group] = steps * groups.count(group) // (one.accumulate if loops else 1)
    return updates


def micro_batches(optimizer: Any) -> tuple[int, int]:
    """(steps that make an update, micro-batches within one step) of what `fit` is given.

    Raises InputError when groups disagree where they cannot.
    """
    optimizers = optimizer.values() if isinstance(optimizer, Mapping) else [optimizer]
    ours = [one for one in optimizers if isinstance(one, Optimizer)]
    steps = {one.accumulate for one in ours if one.accumulate_how == "multi_steps"} - {1}
    scanned = {one.accumulate for one in ours if one.accumulate_how == "scan"} - {1}
    if scanned and len({one.accumulate for one in ours}) + len(steps) > 1:
        raise InputError(
            "optimizer: with accumulate_how='scan' all groups must have the same accumulate, found "
            f"{', '.join(str(one.accumulate) for one in ours)}"
        )
    return max(steps, default=1), max(scanned, default=1)


def _complete(rate: Callable, steps: int) -> Schedule:
    """Calls the partial of a schedule's maker with the length it lacks; a schedule stays itself."""
    if not isinstance(rate, functools.partial):
        return rate
    given = dict(rate.keywords)
    lengths = {"decay_steps", "transition_steps"} & set(inspect.signature(rate.func).parameters)
    missing = {name: steps for name in lengths - set(given)}
    if "schedules" in given:  # each for the steps up to where the next one begins
        ends = [*given.get("boundaries", ()), *len(given["schedules"]) * [steps]]
        given["schedules"] = [
            _complete(one, max(end - begin, 1))
            for one, begin, end in zip(given["schedules"], [0, *ends], ends, strict=False)
        ]
    if "boundaries_and_scales" in given:  # a config has strings for keys
        pairs = dict(given["boundaries_and_scales"]).items()
        given["boundaries_and_scales"] = {int(step): scale for step, scale in pairs}
    try:
        schedule = rate.func(*rate.args, **given, **missing)
        schedule(0)  # some say only here what they do not take
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"optimizer.learning_rate: {error}") from error
    return schedule


def _decay(schedule: Schedule, value: float, decays: Mapping[str, float]) -> GradientTransformation:
    """Subtracts learning rate * value * parameter where `decays` has that value."""

    def mask(params: PyTree) -> PyTree:  # a function, since freezing hides part of the tree
        return jax.tree_util.tree_map_with_path(
            lambda path, _: decays[path_name(path)] == value, params
        )

    return optax.add_decayed_weights(lambda updates: -schedule(updates) * value, mask)


def _without_own_decay(transform: Callable) -> Callable:
    """Turns off the weight decay that optimizers like adamw bring: the rules say all of it."""
    given = transform.keywords if isinstance(transform, functools.partial) else {}
    if callable(given.get("transform")):  # one around another, as `power_averages.tracked`
        return functools.partial(transform, transform=_without_own_decay(given["transform"]))
    if given.get("weight_decay"):
        raise InputError(
            "optimizer: both transform.weight_decay and optimizer.weight_decay are given; keep one"
        )
    if "weight_decay" in inspect.signature(transform).parameters:
        return functools.partial(transform, weight_decay=0.0)
    return transform
