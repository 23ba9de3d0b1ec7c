"""Convolutions by oneDNN against XLA's, and in double precision."""

import platform
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core.primitives import conv_general_dilated_p
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

import main
from cvjax.errors import InputError
from cvjax.nn import fast_conv, onednn
from cvjax.nn.depthwise import depthwise_conv
from cvjax.train.sharding import data_mesh
from tests.children import environment
from tests.nn.test_fast_conv import derivatives, measured

NHWC = ("NHWC", "HWIO", "NHWC")
CALL = "__onednn$convolution"


def leave():
    """As a process is that never called `use_onednn`."""
    from jax._src.lax.convolution import _conv_general_dilated_lower

    own = partial(_conv_general_dilated_lower, expand_complex_convolutions=True)
    mlir.register_lowering(conv_general_dilated_p, own, platform="cpu")
    onednn._in_use = False
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def by_onednn():
    try:
        onednn.use_onednn()
    except InputError as error:
        pytest.skip(str(error))
    yield
    leave()


# x, kernel, and options of lax.conv_general_dilated.
CASES = {
    "usual": ((2, 9, 7, 8), (3, 3, 8, 16), dict(padding="SAME")),
    "odd channels": ((3, 6, 5, 3), (3, 3, 3, 5), dict(padding="SAME")),
    "one image, one channel": ((1, 12, 12, 1), (5, 5, 1, 4), dict(padding="SAME")),
    "strided": ((2, 9, 8, 4), (3, 3, 4, 8), dict(window_strides=(2, 3), padding="SAME")),
    "uneven": ((2, 9, 8, 4), (2, 4, 4, 6), dict(padding=((2, 1), (0, 3)))),
    "dilated": ((2, 9, 8, 4), (3, 3, 4, 8), dict(rhs_dilation=(2, 3), padding="SAME")),
    "smaller than the kernel": ((2, 2, 2, 8), (3, 3, 8, 8), dict(padding="SAME")),
    "padding beyond the image": ((2, 3, 3, 4), (3, 3, 4, 4), dict(padding=((5, 5), (4, 6)))),
    "many images": ((35, 32, 32, 16), (3, 3, 16, 32), dict(padding="SAME")),
    "many images, strided": (
        (34, 65, 64, 17), (3, 2, 17, 32), dict(window_strides=(2, 2), padding=((0, 1), (1, 1))),
    ),
    "a pixel's kernel": ((2, 5, 6, 4), (1, 1, 4, 8), dict(padding="VALID")),
    "patches": ((2, 8, 12, 3), (4, 4, 3, 8), dict(window_strides=(4, 4), padding="VALID")),
    "to one pixel": ((2, 4, 5, 9), (4, 5, 9, 8), dict(padding="VALID")),
    "kernel as large as the image": ((2, 4, 5, 9), (4, 5, 9, 8), dict(padding="SAME")),
    "a pixel's kernel, many channels": ((3, 5, 6, 12), (1, 1, 12, 8), dict(padding="VALID")),
    "dilated and strided, many channels": (
        (2, 11, 12, 9), (3, 2, 9, 8),
        dict(window_strides=(2, 3), rhs_dilation=(3, 2), padding=((2, 3), (1, 0))),
    ),
    "channels first": (
        (2, 4, 6, 5), (8, 4, 3, 3), dict(padding="SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    ),
    "cropping": ((2, 6, 6, 6), (3, 3, 6, 8), dict(padding=((-1, 0), (2, -2)))),
    "strided, a row too many": (
        (2, 9, 9, 9), (2, 3, 9, 8), dict(window_strides=(2, 3), padding="VALID")
    ),
    "strided, many features": (
        (2, 9, 8, 5), (3, 4, 5, 128), dict(window_strides=(2, 3), padding="SAME")
    ),
    "strided, many features, a row too many": (
        (2, 9, 10, 5), (2, 3, 5, 130), dict(window_strides=(2, 4), padding="VALID")
    ),
    "strided beyond the kernel, many features": (
        (2, 8, 7, 4), (1, 2, 4, 128), dict(window_strides=(2, 3), padding=((0, 0), (1, 1)))
    ),
    "stretched, many channels": (
        (2, 4, 3, 128), (3, 2, 128, 4), dict(lhs_dilation=(2, 3), padding=((-1, 3), (4, -2)))
    ),
    "strided, many features, channels first": (
        (2, 4, 6, 5), (128, 4, 3, 3), dict(
            window_strides=(2, 2), padding=((1, 1), (1, 1)),
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )
    ),
    "depthwise": ((2, 9, 8, 16), (7, 7, 1, 16), dict(padding="SAME")),
    "depthwise, many images": ((35, 3, 4, 2), (3, 3, 1, 2), dict(padding="SAME")),
    "depthwise, strided": (
        (3, 9, 8, 3), (3, 3, 1, 3), dict(window_strides=(2, 2), padding=((1, 1), (1, 1)))
    ),
    "depthwise, strided, a row too many": (
        (3, 9, 10, 12), (2, 3, 1, 12), dict(window_strides=(2, 4), padding="VALID")
    ),
    "several features for each channel": (
        (2, 5, 6, 4), (3, 3, 1, 12), dict(feature_group_count=4, padding="SAME")
    ),
    "depthwise, dilated": ((2, 9, 8, 6), (3, 3, 1, 6), dict(rhs_dilation=(3, 2), padding="SAME")),
    "depthwise, stretched": (
        (2, 4, 5, 8), (3, 4, 1, 8), dict(lhs_dilation=(2, 3), padding=((1, 2), (0, 3)))
    ),
    "depthwise, cropping": ((2, 6, 7, 8), (3, 3, 1, 8), dict(padding=((-1, 0), (1, -2)))),
    "depthwise, smaller than the kernel": ((2, 2, 3, 8), (5, 5, 1, 8), dict(padding="SAME")),
    "depthwise, one image, channels first": (
        (1, 8, 4, 6), (8, 1, 3, 3), dict(padding="SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    ),
    "layouts of all kinds": (
        (6, 2, 5, 4), (4, 3, 8, 3),
        dict(padding="SAME", dimension_numbers=("HNWC", "IHOW", "CWHN")),
    ),
}  # fmt: skip


def arrays(name, seed=0):
    x, kernel, options = CASES[name]
    rng = np.random.default_rng(seed)
    options = {"window_strides": (1, 1), "dimension_numbers": NHWC, **options}
    if name.startswith("depthwise"):
        options["feature_group_count"] = x[options["dimension_numbers"][0].index("C")]
    convolve = lambda x, kernel: lax.conv_general_dilated(x, kernel, **options)  # noqa: E731
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in (x, kernel))
    return x, kernel, convolve


def program(function, *given):
    return jax.jit(lambda *given: function(*given)).lower(*given).compile()


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_as_exact_as_those_of_xla(name, by_onednn):
    x, kernel, convolve = arrays(name)
    dy = np.random.default_rng(1).standard_normal(jax.eval_shape(convolve, x, kernel).shape)
    dy = dy.astype(np.float32)
    ours = program(partial(measured, convolve), x, kernel, dy)
    assert CALL in ours.as_text()
    if name.startswith("depthwise") or "many features" in name:  # both gradients, too
        assert " convolution(" not in ours.as_text()
    leave()
    own = program(partial(measured, convolve), x, kernel, dy)
    assert CALL not in own.as_text()
    with jax.enable_x64(True):
        given = (np.float64(value) for value in (x, kernel, dy))
        exact = jax.device_get(jax.jit(partial(measured, convolve))(*given))
    of_ours, of_xla = jax.device_get((ours(x, kernel, dy), own(x, kernel, dy)))
    for mine, theirs, truth in zip(of_ours, of_xla, exact, strict=True):
        # Twice XLA's error, or eight roundings of the largest value where XLA happens to have less;
        # of more than a hundred channels, which oneDNN adds one after another, or of half a million
        # numbers, twice as many.
        roundings = 16 if "many features" in name or "many images" in name else 8
        bound = max(2 * np.abs(theirs - truth).max(), roundings * 6e-8 * np.abs(truth).max())
        assert mine.dtype == np.float32
        assert np.abs(mine - truth).max() <= bound


@pytest.mark.parametrize("name", ["usual", "depthwise"])
def test_second_derivatives_forward_mode_vmap_and_loops(name, by_onednn):
    x, kernel, convolve = arrays(name)
    dx, dkernel, _ = arrays(name, seed=1)

    def all_of(x, kernel, dx, dkernel):
        square = kernel[:, :, :, : x.shape[-1]]
        loop = lambda x, _: (jnp.tanh(convolve(x, square)), None)  # noqa: E731
        kept = jax.checkpoint(lambda x: jnp.sum(convolve(x, kernel) ** 2))
        return (
            derivatives(convolve, x, kernel, dx, dkernel),
            lax.scan(loop, x, None, length=3)[0],
            jax.grad(kept)(x),
        )

    given = x, kernel, dx, dkernel
    ours = jax.device_get(program(all_of, *given)(*given))
    leave()
    own = jax.device_get(program(all_of, *given)(*given))
    # Sums in another order; up to 2,000 terms and a second derivative: 1e-4 of the largest.
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


OTHERS = {
    "groups": ((2, 4, 4, 6), (3, 3, 3, 8), dict(feature_group_count=2)),
    "batch groups": ((4, 4, 4, 6), (3, 3, 6, 8), dict(batch_group_count=2)),
    "stretched": ((2, 4, 4, 6), (3, 3, 6, 8), dict(lhs_dilation=(2, 2))),
    "stretched and strided": (
        (2, 4, 4, 128),
        (3, 3, 128, 8),
        dict(lhs_dilation=(2, 2), window_strides=(3, 1)),
    ),
    "few features": ((2, 4, 4, 6), (3, 3, 6, 3), {}),
    "no images": ((0, 4, 4, 6), (3, 3, 6, 8), {}),
    "no channels": ((2, 4, 4, 0), (3, 3, 0, 8), {}),
    "volumes": ((2, 4, 4, 4, 3), (3, 3, 3, 3, 8), {}),
    "series": ((2, 9, 3), (3, 3, 8), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_others_are_xlas(name, by_onednn):
    x_shape, kernel_shape, options = OTHERS[name]
    letters = {3: ("NWC", "WIO", "NWC"), 4: NHWC, 5: ("NDHWC", "DHWIO", "NDHWC")}
    ones = (1,) * (len(x_shape) - 2)
    if "lhs_dilation" in options:
        options = dict(options, padding=((1, 1), (1, 1)))
    options = {"padding": "SAME", "window_strides": ones, **options}
    dimensions = letters[len(x_shape)]
    convolve = partial(lax.conv_general_dilated, dimension_numbers=dimensions, **options)
    given = np.ones(x_shape, np.float32), np.ones(kernel_shape, np.float32)
    ours = program(convolve, *given)
    assert CALL not in ours.as_text()
    assert np.isfinite(ours(*given)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.int32])
def test_other_types_are_xlas(dtype, by_onednn):
    x, kernel, convolve = arrays("usual")
    given = x.astype(dtype), kernel.astype(dtype)
    ours = program(convolve, *given)
    assert CALL not in ours.as_text()
    assert ours(*given).dtype == dtype


def test_complex_ones_are_three_real_ones(by_onednn):
    x, kernel, convolve = arrays("usual")
    dx, dkernel, _ = arrays("usual", seed=1)
    ours = program(convolve, x + 1j * dx, kernel + 1j * dkernel)
    assert CALL in ours.as_text()
    real = convolve(x, kernel) - convolve(dx, dkernel)
    # Sums of 72 products of order one, in another order.
    np.testing.assert_allclose(ours(x + 1j * dx, kernel + 1j * dkernel).real, real, atol=2e-4)


def test_each_device_by_itself_but_not_a_program_that_is_divided(by_onednn):
    x, kernel, convolve = arrays("usual")
    x = np.concatenate([x] * 8)
    mesh, data = data_mesh(), PartitionSpec("data")
    divided = jax.jit(convolve, in_shardings=(jax.NamedSharding(mesh, data), None))
    divided = divided.lower(x, kernel).compile()
    assert CALL not in divided.as_text()
    mapped = jax.shard_map(
        convolve, mesh=mesh, in_specs=(data, PartitionSpec()), out_specs=data, check_vma=False
    )
    mapped = jax.jit(mapped).lower(x, kernel).compile()
    assert CALL in mapped.as_text()
    # Sums of 72 products of order one, in another order.
    np.testing.assert_allclose(mapped(x, kernel), divided(x, kernel), rtol=0, atol=1e-4)


def test_small_maps_are_gathered_where_onednn_does_not_come(by_onednn, monkeypatch):
    """Where programs are divided between devices its operation is not used, and XLA's is slow."""
    x, kernel = np.empty((2, 4, 4, 8)), np.empty((3, 3, 8, 8))

    def gathered(strides=(1, 1), kernel=kernel):
        return fast_conv._form(x, kernel, strides, ((1, 1), (1, 1))) is fast_conv._gathered

    assert gathered()  # eight devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert not gathered()
    assert gathered(strides=(2, 2)) and gathered(kernel=kernel[:1, :1])
    narrow = np.empty((2, 9, 9, 8)), kernel, (1, 1), ((1, 1), (1, 1))
    assert fast_conv._form(*narrow) is None
    leave()
    assert gathered()
    assert fast_conv._form(*narrow) is fast_conv._paired


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_depthwise_convolutions_have_their_own_form_only_where_onednn_does_not_come(
    dtype, by_onednn, monkeypatch
):
    x, kernel, _ = arrays("depthwise")
    given = x.astype(dtype), kernel.astype(dtype)

    def gradients(x, kernel):
        return jax.vjp(lambda *given: depthwise_conv(*given, (2, 2), "SAME"), x, kernel)[1](
            jnp.ones((2, 5, 4, 16), dtype)
        )

    shifted = program(gradients, *given)
    assert CALL not in shifted.as_text()  # eight devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    chosen = program(gradients, *given)
    assert (CALL in chosen.as_text()) == (dtype == np.float32)
    # Sums of up to 49 products of order one, in another order.
    for mine, theirs in zip(chosen(*given), shifted(*given), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


def test_programs_are_not_kept(by_onednn, tmp_path):
    """XLA reads its thunk as one of another kind when it writes it down."""
    x, kernel, convolve = arrays("usual")
    place = jax.config.jax_compilation_cache_dir
    times = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        program(convolve, x, kernel)
        assert not list(tmp_path.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", place)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", times)


def test_elsewhere_it_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(onednn, "version", lambda _: "0.99.1")
    with pytest.raises(InputError, match=r"oneDNN is in jaxlib 0\.10\.x and 0\.12\.x .* 0\.99\.1"):
        onednn.use_onednn()
    assert main.main(["--onednn", "--config=configs/diffusion.py:tiny"]) == 2
    assert "this is jaxlib 0.99.1" in capsys.readouterr().err
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(onednn, "version", lambda _: "0.10.2")
    with pytest.raises(InputError, match="aarch64"):
        onednn.use_onednn()


def test_a_run_with_the_flag_and_its_evaluation_without(by_onednn, tmp_path):
    command = [sys.executable, "main.py", f"--workdir={tmp_path}/run"]
    recipe = ["--config=configs/classification.py:tiny", "--config.steps=2"]
    for flags in (["--onednn", *recipe], ["--mode=evaluate"]):
        done = subprocess.run(
            [*command, *flags], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "accuracy" in done.stdout + done.stderr
        assert "arning" not in done.stderr
        assert "thunk" not in done.stderr
