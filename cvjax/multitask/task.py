"""Several predictions from one backbone, trained together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from clu.metrics import Average

from cvjax.checks import check_between, check_channels, fitting
from cvjax.errors import InputError, naming_fields, nearest
from cvjax.nn.features import ordered_features
from cvjax.nn.train_pass import train_pass
from cvjax.train.state import Params, PyTree, TrainState
from cvjax.train.task import Batch, Metrics, Objective

WEIGHTINGS = ("fixed", "uncertainty")
LOG_VARIANCE = "log_variance"


@dataclass(frozen=True)
class Head:
    """One of the predictions, and what becomes of it.

    Attributes:
      module: called as `module(maps, size, train=..., valid=...)` with the maps of the backbone,
        the finest first, and the height and width of the image; returns its outputs. The heads of
        `cvjax.segmentation.heads` and `cvjax.multitask.multilabel.Pooled` are such modules.
      criterion: (outputs, batch) -> (scalar loss, metrics), where nothing counts that is not
        `valid`: `cvjax.segmentation.task.measure`, `cvjax.multitask.multilabel.measure`.
      predict: outputs -> what evaluators see under the name of the head; None for the outputs.
      picture: (outputs, batch) -> an image [H, W, 1 or 3] in [0, 1] for people; None for none.
      weight: of the loss, where weights are fixed.
      check: (batch on the host, module) -> raises InputError for truth that the criterion cannot
        take: `cvjax.segmentation.task.check_masks`, `cvjax.multitask.multilabel.check`; None for
        none.
    """

    module: nn.Module
    criterion: Callable[[PyTree, Batch], tuple[jax.Array, Metrics]]
    predict: Callable[[PyTree], jax.Array] | None = None
    picture: Callable[[PyTree, Batch], jax.Array] | None = None
    weight: float = 1.0
    check: Callable[[Batch, nn.Module], None] | None = None


class Network(nn.Module):
    """A backbone and the modules of its heads, by name."""

    backbone: nn.Module
    heads: Mapping[str, nn.Module]

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, PyTree]:
        """Returns the outputs of each head for images [b, h, w, c], normalized."""
        maps = ordered_features(self.backbone, x, train=train, valid=valid)
        size = x.shape[1:3]
        return {
            name: head(maps, size, train=train, valid=valid) for name, head in self.heads.items()
        }


@dataclass(frozen=True)
class MultiTask:
    """Trains one backbone and several heads with a weighted sum of their losses.

    A batch is {"image": float32 [b, h, w, c] in [0, 1], "valid": bool [b]} and what the criteria
    need besides. The metrics of a head come as `<head>/<metric>`.

    Attributes:
      backbone: a module with `features(x, *, train)` and `strides`.
      heads: by name.
      weighting: "fixed": the sum of weight * loss. "uncertainty": each head learns a log-variance
        s, and the sum is of exp(-s) loss + s / 2 (A. Kendall, Y. Gal, R. Cipolla: Multi-Task
        Learning Using Uncertainty to Weigh Losses, https://arxiv.org/abs/1705.07115, equation 10,
        for losses that are negative log-likelihoods of classes); the fixed weights are not used.
      mean, std: the backbone sees (image - mean) / std: numbers, or one for each channel.

    Raises:
      InputError: there are no heads, one is none, or there is no such weighting.
    """

    backbone: nn.Module
    heads: Mapping[str, Head]
    weighting: str = "fixed"
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    def __post_init__(self):
        if not self.heads:
            raise InputError("MultiTask: heads is empty; there must be at least one")
        for name, head in self.heads.items():
            if not isinstance(head, Head):
                raise InputError(f"MultiTask: heads.{name} is {head!r}; it must be a Head")
            check_between(0, math.inf, **{f"MultiTask: heads.{name}.weight": head.weight})
        if self.weighting not in WEIGHTINGS:
            raise InputError(
                f"MultiTask: weighting is {self.weighting!r}{nearest(self.weighting, WEIGHTINGS)}"
            )

    @property
    def network(self) -> Network:
        """The backbone and the heads as one module."""
        return Network(self.backbone, {name: head.module for name, head in self.heads.items()})

    @property
    def objectives(self) -> Sequence[Objective]:
        """One: the sum of the heads' losses, for the group "model"."""
        return (Objective("model", self.loss),)

    def check(self, batch: Batch) -> None:
        """Raises InputError for what the `check` of a head refuses.

        Also for a `mean` or `std` of another length than images have channels.
        """
        check_channels(batch, mean=self.mean, std=self.std)
        for name, head in self.heads.items():
            if head.check is not None:
                with fitting(f"heads.{name}.check"), naming_fields(f"heads.{name}", batch):
                    head.check(batch, head.module)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Params, PyTree]:
        """Returns {"model": {"backbone": ..., "heads_<name>": ...}} and other collections.

        With uncertainties there also is "log_variance", one number for each head, 0 at first.
        """
        params_rng, dropout_rng = jax.random.split(rng)
        rngs = {"params": params_rng, "dropout": dropout_rng}
        variables = self.network.init(rngs, self._input(batch), train=False)
        params = variables.pop("params")
        if self.weighting == "uncertainty":
            params = {**params, LOG_VARIANCE: {name: jnp.zeros(()) for name in self.heads}}
        return {"model": params}, variables

    def loss(
        self, params: Params, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """The weighted sum of the losses of the heads."""
        variables = self._variables(params, state.model_state)
        outputs, model_state = train_pass(
            self.network, variables, self._input(batch), batch["valid"], {"dropout": rng}
        )
        value, metrics = self._measure(params, outputs, batch)
        return value, (model_state, metrics)

    def evaluate(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> Metrics:
        """Returns the weighted loss and the metrics of each head.

        A head's own metrics are exact over the set; `loss`, of terms with counts of their own
        (images, pixels), is the mean of the batches' losses, each as often as it has examples.
        """
        return self._measure(params, self._outputs(params, model_state, batch), batch)[1]

    def predict(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the prediction of each head under its name."""
        outputs = self._outputs(params, model_state, batch)
        for name, head in self.heads.items():
            if head.predict is not None:
                with fitting(f"heads.{name}.predict"):
                    outputs[name] = head.predict(outputs[name])
        return outputs

    def visualize(
        self, params: Params, model_state: PyTree, batch: Batch, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the picture of each head that has one."""
        outputs = self._outputs(params, model_state, batch)
        pictures = {}
        for name, head in self.heads.items():
            if head.picture is not None:
                with fitting(f"heads.{name}.picture"):
                    pictures[name] = head.picture(outputs[name], batch)
        return pictures

    def _measure(
        self, params: Params, outputs: dict[str, PyTree], batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        total, found = 0.0, {}
        count = jnp.sum(batch["valid"])
        for name, head in self.heads.items():
            with fitting(f"heads.{name}.criterion"), naming_fields(f"heads.{name}", batch):
                value, metrics = head.criterion(outputs[name], batch)
            found |= {f"{name}/{metric}": one for metric, one in metrics.items()}
            if self.weighting == "fixed":
                total += head.weight * value
                continue
            s = params["model"][LOG_VARIANCE][name]
            # A batch without truth for this head teaches nothing, about its variance neither.
            truths = metrics["loss"].count if "loss" in metrics else count
            total += jnp.where(truths > 0, jnp.exp(-s) * value + s / 2, 0.0)
            found[f"{name}/weight"] = Average(total=jnp.exp(-s) * count, count=count)
        return total, {"loss": Average(total=total * count, count=count), **found}

    def _variables(self, params: Params, model_state: PyTree) -> PyTree:
        modules = {name: one for name, one in params["model"].items() if name != LOG_VARIANCE}
        return {"params": modules, **model_state}

    def _outputs(self, params: Params, model_state: PyTree, batch: Batch) -> dict[str, PyTree]:
        variables = self._variables(params, model_state)
        return self.network.apply(variables, self._input(batch), train=False)

    def _input(self, batch: Batch) -> jax.Array:
        """The normalized images; zeros where not valid, whatever (NaN, even) is there."""
        image = (batch["image"] - jnp.array(self.mean)) / jnp.array(self.std)
        return jnp.where(batch["valid"][:, None, None, None], image, 0.0)
