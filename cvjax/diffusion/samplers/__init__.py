"""Samplers: from noise to images with the help of a denoiser, for any `Process`.

All share the signature `sampler(denoise, process, keys, shape, steps, *, ...)`:

    denoise   (x [b, *shape], t [b]) -> what `process.prediction` names, the same shape as x
    keys      typed PRNG keys [b], one for each image: an image depends on its own key alone, not
              on its place in the batch
    shape     of one image
    steps     of the grid `times` (`cvjax.diffusion.grids`), from t = 1 to t = 0
    start     [b, *shape], x at t = 1 in place of noise from the keys, where a sampler can be
              deterministic

and return float32 [b, *shape], x at t = 0. Each is one program of `lax.scan`s: jit the caller.
`evaluations(sampler, process, steps)` says how often it asks the network.

| sampler | of what | order | evaluations in n steps |
|---|---|---|---|
| `ddim`, `euler` | the ODE | 1 | n |
| `heun` | the ODE; with churn | 2 | 2 n - 1 |
| `dpm_solver_2m` | the ODE, multistep | 2 | n |
| `unipc` | the ODE, multistep | 3 (`order` + 1) | n |
| `adaptive` | the ODE, steps of its own | 5 | as many as it takes |
| `ddpm` | ancestral: p(x_s given x_t, x_0) | 1 | n |
| `euler_maruyama` | the reverse SDE | 1 in distribution | n |
| `predictor_corrector` | `ddpm`, and Langevin | 1 in distribution | 2 n - 1 |
"""

from cvjax.diffusion.samplers.adaptive import adaptive
from cvjax.diffusion.samplers.ancestral import ddim, ddpm
from cvjax.diffusion.samplers.evaluations import evaluations
from cvjax.diffusion.samplers.integration import Denoise, Shape
from cvjax.diffusion.samplers.multistep import dpm_solver_2m, unipc
from cvjax.diffusion.samplers.ode import euler, heun
from cvjax.diffusion.samplers.sde import euler_maruyama, predictor_corrector
from cvjax.train.task import example_keys

__all__ = [
    "Denoise",
    "Shape",
    "adaptive",
    "ddim",
    "ddpm",
    "dpm_solver_2m",
    "euler",
    "euler_maruyama",
    "evaluations",
    "example_keys",
    "heun",
    "predictor_corrector",
    "unipc",
]
