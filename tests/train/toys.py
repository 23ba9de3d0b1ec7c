"""Four tasks as unlike each other as research gets; the engine must not know any of them."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cvjax.train.task import Objective, mean


class Network(nn.Module):
    """A small perceptron."""

    width: int = 8
    outputs: int = 2
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(self.width)(x)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.outputs)(jnp.tanh(x))


class Quiet:
    """What the toys do not do."""

    def evaluate(self, params, model_state, batch, rng):
        return {}

    def predict(self, params, model_state, batch, rng):
        return {}

    def visualize(self, params, model_state, batch, rng):
        return {}


@dataclass(frozen=True)
class Regression(Quiet):
    """Least squares; `noise` draws random numbers, `batch_norm` has statistics."""

    model: nn.Module = Network()
    noise: float = 0.0

    @property
    def objectives(self):
        return (Objective("model", self.loss),)

    def init(self, rng, batch):
        state = self.model.init(rng, batch["x"])
        return {"model": state["params"]}, {k: v for k, v in state.items() if k != "params"}

    def loss(self, params, state, batch, rng):
        x = batch["x"] + self.noise * jax.random.normal(rng, batch["x"].shape)
        outputs, model_state = self.model.apply(
            {"params": params["model"], **state.model_state}, x, train=True, mutable=["batch_stats"]
        )
        errors = mean(jnp.sum((outputs - batch["y"]) ** 2, -1), batch["valid"])
        return errors.total / errors.count, (dict(model_state), {"loss": errors})

    def evaluate(self, params, model_state, batch, rng):
        outputs = self.model.apply({"params": params["model"], **model_state}, batch["x"])
        return {"loss": mean(jnp.sum((outputs - batch["y"]) ** 2, -1), batch["valid"])}


@dataclass(frozen=True)
class Valid(Regression):
    """The same with a loss that may meet no valid example at all."""

    def loss(self, params, state, batch, rng):
        # What is not valid may be NaN, of which 0 times the gradient would be NaN, too.
        x, y = (jnp.where(batch["valid"][:, None], batch[name], 0) for name in "xy")
        errors = mean(jnp.sum((self.model.apply({"params": params["model"]}, x) - y) ** 2, -1),
                      batch["valid"])  # fmt: skip
        return errors.total / jnp.maximum(errors.count, 1), (state.model_state, {"loss": errors})


@dataclass(frozen=True)
class Adversarial(Quiet):
    """GAN-shaped: two groups, two critic steps before each generator step."""

    generator: nn.Module = Network(outputs=2)
    discriminator: nn.Module = Network(outputs=1)

    @property
    def objectives(self):
        critic = Objective("discriminator", self.critic_loss)
        return (critic, critic, Objective("generator", self.generator_loss))

    def init(self, rng, batch):
        one, two = jax.random.split(rng)
        return {
            "generator": self.generator.init(one, batch["x"])["params"],
            "discriminator": self.discriminator.init(two, batch["y"])["params"],
        }, {}

    def fake(self, params, batch, rng):
        noise = jax.random.normal(rng, batch["x"].shape)
        return self.generator.apply({"params": params["generator"]}, noise)

    def critic(self, params, x):
        return self.discriminator.apply({"params": params["discriminator"]}, x)[:, 0]

    def critic_loss(self, params, state, batch, rng):
        real, fake = (
            self.critic(params, batch["y"]),
            self.critic(params, self.fake(params, batch, rng)),
        )
        losses = jax.nn.softplus(-real) + jax.nn.softplus(fake)
        return losses.mean(), (state.model_state, {"critic_loss": mean(losses)})

    def generator_loss(self, params, state, batch, rng):
        losses = jax.nn.softplus(-self.critic(params, self.fake(params, batch, rng)))
        return losses.mean(), (state.model_state, {"generator_loss": mean(losses)})


@dataclass(frozen=True)
class Bootstrap(Quiet):
    """BYOL-shaped: the teacher is the moving average of the student."""

    model: nn.Module = Network()

    @property
    def objectives(self):
        return (Objective("student", self.loss),)

    def init(self, rng, batch):
        return {"student": self.model.init(rng, batch["x"])["params"]}, {}

    def loss(self, params, state, batch, rng):
        one, two = (
            batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
            for key in jax.random.split(rng)
        )
        student = self.model.apply({"params": params["student"]}, one)
        teacher = jax.lax.stop_gradient(self.model.apply({"params": state.ema["student"]}, two))
        losses = jnp.sum((student - teacher - 1.0) ** 2, -1)
        return losses.mean(), (state.model_state, {"loss": mean(losses)})


@dataclass(frozen=True)
class MetaLearning(Quiet):
    """MAML-shaped: the loss differentiates through a gradient step of its own."""

    model: nn.Module = Network()
    inner_rate: float = 0.1

    @property
    def objectives(self):
        return (Objective("model", self.loss),)

    def init(self, rng, batch):
        return {"model": self.model.init(rng, batch["x"])["params"]}, {}

    def loss(self, params, state, batch, rng):
        def errors(weights, x, y):
            return jnp.mean((self.model.apply({"params": weights}, x) - y) ** 2)

        half = batch["x"].shape[0] // 2
        support, query = (
            (batch["x"][:half], batch["y"][:half]),
            (batch["x"][half:], batch["y"][half:]),
        )
        gradient = jax.grad(errors)(params["model"], *support)
        adapted = jax.tree.map(lambda w, g: w - self.inner_rate * g, params["model"], gradient)
        value = errors(adapted, *query)
        return value, (state.model_state, {"loss": mean(value)})


def batch_of(seed, size=16):
    """A batch of a linear problem."""
    x = np.random.default_rng(seed).normal(size=(size, 3)).astype(np.float32)
    y = x @ np.array([[1.0, -1.0], [0.5, 2.0], [-1.0, 0.3]], np.float32)
    return {"x": x, "y": y, "valid": np.ones(size, bool)}


@dataclass(frozen=True)
class Linear:
    """A source of the same linear problem; each read takes `seconds`."""

    size: int = 100
    seconds: float = 0.0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        time.sleep(self.seconds)
        x = np.random.default_rng(index).normal(size=3).astype(np.float32)
        return {"x": x, "y": x @ np.array([[1, -1], [0.5, 2], [-1, 0.3]], np.float32)}
