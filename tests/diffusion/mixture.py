"""A Gaussian mixture in the plane, of which all is known: what takes a network's place in tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cvjax.diffusion.process import combine

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-1.0, 0.0], [0.8, 0.6], [0.5, -1.0]])
COVARIANCES = np.array(
    [[[0.04, 0.02], [0.02, 0.05]], [[0.02, 0.0], [0.0, 0.06]], [[0.03, -0.01], [-0.01, 0.03]]]
)
VARIANCES, AXES = np.linalg.eigh(COVARIANCES)


def _towards(x, alpha, sigma):
    """For each component, of x_t [n, 2] at alpha, sigma [n]: log p(x_t, k) [n, k] and
    (alpha^2 C + sigma^2 I)^-1 (x_t - alpha mean) [n, k, 2]."""
    means, axes, variances = (jnp.asarray(c, x.dtype) for c in (MEANS, AXES, VARIANCES))
    away = jnp.einsum("kij,nki->nkj", axes, x[:, None] - alpha[:, None, None] * means)
    variances = alpha[:, None, None] ** 2 * variances + sigma[:, None, None] ** 2
    joint = jnp.asarray(np.log(WEIGHTS / (2 * np.pi)), x.dtype)
    joint -= jnp.sum(away**2 / variances + jnp.log(variances), axis=-1) / 2
    return joint, jnp.einsum("kij,nkj->nki", axes, away / variances)


@jax.jit
def log_joint(x, alpha, sigma):
    """log p(x_t, component), [n, k]."""
    return _towards(x, alpha, sigma)[0]


@jax.jit
def log_density(x, alpha=1.0, sigma=0.0):
    """log p(x_t), [n]."""
    alpha, sigma = (jnp.broadcast_to(factor, len(x)) for factor in (alpha, sigma))
    return jax.nn.logsumexp(log_joint(x, alpha, sigma), axis=-1)


@functools.cache
def exact(process, component=None):
    """E[x_0 | x_t], of all or of one component, as what the process predicts."""

    @jax.jit
    def denoise(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        joint, towards = _towards(x, alpha, sigma)
        of = jax.nn.softmax(joint)
        of = of if component is None else jnp.zeros_like(of).at[:, component].set(1)
        means, covariances = (jnp.asarray(c, x.dtype) for c in (MEANS, COVARIANCES))
        means += alpha[:, None, None] * jnp.einsum("kij,nkj->nki", covariances, towards)
        x0 = jnp.einsum("nk,nki->ni", of, means)
        # Written out rather than through x_t - alpha x_0, which at small sigma is all rounding.
        eps = sigma[:, None] * jnp.einsum("nk,nki->ni", of, towards)
        return combine(process, process.prediction, x0, eps, t)

    return denoise


def points(count, seed=0):
    """Exact draws, [count, 2]."""
    rng = np.random.default_rng(seed)
    of = rng.choice(len(WEIGHTS), count, p=WEIGHTS)
    scaled = rng.standard_normal((count, 2)) * np.sqrt(VARIANCES)[of]
    return MEANS[of] + np.einsum("nij,nj->ni", AXES[of], scaled)


def assert_is_mixture(x, bias):
    """Weights, means and covariances are right to 4 standard errors and the `bias` of each.

    The components are so far apart that nearly every point belongs to one of them alone: a
    component's share of n points has the standard error sqrt(w (1 - w) / n), its mean
    sqrt(C_ii / (n w)), its covariance sqrt((C_ii C_jj + C_ij^2) / (n w)).
    """
    n = len(x)
    of = np.asarray(
        jax.nn.softmax(log_joint(x, np.ones(n, np.float32), np.zeros(n, np.float32))), np.float64
    )
    x = np.asarray(x, np.float64)
    share = of.mean(axis=0)
    means = (of.T @ x) / (n * share[:, None])
    away = x[:, None] - means
    covariances = np.einsum("nk,nki,nkj->kij", of, away, away) / (n * share)[:, None, None]
    spread = np.diagonal(COVARIANCES, axis1=1, axis2=2)
    squares = spread[:, :, None] * spread[:, None] + COVARIANCES**2
    count = n * WEIGHTS
    for name, found, true, error in (
        ("weights", share, WEIGHTS, np.sqrt(WEIGHTS * (1 - WEIGHTS) / n)),
        ("means", means, MEANS, np.sqrt(spread / count[:, None])),
        ("covariances", covariances, COVARIANCES, np.sqrt(squares / count[:, None, None])),
    ):
        excess = np.abs(found - true) - 4 * error
        assert (excess <= bias[name]).all(), f"{name} are {found}, not {true}: {excess.max():.4f}"
