"""Inception v3, as it is used to compare images.

C. Szegedy et al.: Rethinking the Inception Architecture, https://arxiv.org/abs/1512.00567. Without
the auxiliary classifier, which is for training alone. There are two trained networks:

    InceptionV3()                                       of the FID, 1008 classes
    InceptionV3(num_classes=1000, variant="torchvision")

The weights of the FID are those of the file "inception-2015-12-05", which pytorch-fid carried over
to torch with the names of torchvision; the network differs from torchvision's in what its pooling
does at the border, and in a maximum in the last block. `nn.pretrained.load_variables` reads both
files. Distances by torchvision's weights are not comparable with published ones.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cvjax.checks import check_at_least, check_choices
from cvjax.nn.batch_norm import BatchNorm

Size = tuple[int, int]
VARIANTS = ("fid", "torchvision")


class Unit(nn.Module):
    """Convolution without bias, norm, relu. Zeros keep the size, or ("VALID") nothing is added."""

    features: int
    kernel: Size
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, valid: jax.Array | None) -> jax.Array:
        """Maps [b, h, w, c] to [b, h', w', features].

        `valid`, bool [b], says which rows take part in the batch statistics.
        """
        x = nn.Conv(
            self.features, self.kernel, self.stride, self.padding, use_bias=False, name="conv"
        )(x)
        norm = BatchNorm(epsilon=1e-3, name="bn")
        return nn.relu(norm(x, train, valid))


# A branch is a row of units (name, channels, kernel); a tuple in place of a name forks the end of
# the branch into two, side by side. The last branch is behind the pooling.
Branch = tuple[tuple[str | tuple[str, str], int, Size | tuple[Size, Size]], ...]


def _block_5(pooled: int) -> tuple[Branch, ...]:
    """Figure 5 of the paper, as released: the 5x5 convolution is still there."""
    return (
        (("branch1x1", 64, (1, 1)),),
        (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
        (
            ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ),
        (("branch_pool", pooled, (1, 1)),),
    )  # fmt: skip


def _block_6(inner: int) -> tuple[Branch, ...]:
    """Figure 6: 7x7 convolutions as products of 1x7 and 7x1."""
    return (
        (("branch1x1", 192, (1, 1)),),
        (
            ("branch7x7_1", inner, (1, 1)), ("branch7x7_2", inner, (1, 7)),
            ("branch7x7_3", 192, (7, 1)),
        ),
        (
            ("branch7x7dbl_1", inner, (1, 1)), ("branch7x7dbl_2", inner, (7, 1)),
            ("branch7x7dbl_3", inner, (1, 7)), ("branch7x7dbl_4", inner, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ),
        (("branch_pool", 192, (1, 1)),),
    )  # fmt: skip


# Figure 7: the last convolutions of two branches are 1x3 beside 3x1.
_SPLIT = ((1, 3), (3, 1))
BLOCK_7: tuple[Branch, ...] = (
    (("branch1x1", 320, (1, 1)),),
    (("branch3x3_1", 384, (1, 1)), (("branch3x3_2a", "branch3x3_2b"), 384, _SPLIT)),
    (
        ("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3)),
        (("branch3x3dbl_3a", "branch3x3dbl_3b"), 384, _SPLIT),
    ),
    (("branch_pool", 192, (1, 1)),),
)  # fmt: skip
# Figure 10: the last unit of each branch halves the map; pooling has no unit behind it.
REDUCTION_6: tuple[Branch, ...] = (
    (("branch3x3", 384, (3, 3)),),
    (
        ("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)),
        ("branch3x3dbl_3", 96, (3, 3)),
    ),
    (),
)  # fmt: skip
REDUCTION_7: tuple[Branch, ...] = (
    (("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3))),
    (
        ("branch7x7x3_1", 192, (1, 1)), ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, (3, 3)),
    ),
    (),
)  # fmt: skip


class Mixed(nn.Module):
    """Branches side by side, the last of them on what 3x3 pixels have in common.

    Attributes:
      branches: see `Branch`.
      pooling: "mean" or "maximum".
      of_fid: at the border, the mean of those pixels that are there; else zeros count too.
      stride: 2 halves the map, without padding.
    """

    branches: tuple[Branch, ...]
    pooling: str
    of_fid: bool
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, valid: jax.Array | None) -> jax.Array:
        """Maps [b, h, w, c] to [b, h', w', the sum of the branches' channels]."""
        padding = "SAME" if self.stride == 1 else "VALID"
        window, strides = (3, 3), (self.stride, self.stride)
        if self.pooling == "maximum":
            pooled = nn.max_pool(x, window, strides, padding)
        else:
            pooled = nn.avg_pool(x, window, strides, padding, count_include_pad=not self.of_fid)
        *others, behind = self.branches
        parts = []
        for branch, y in [*((branch, x) for branch in others), (behind, pooled)]:
            for number, (name, features, kernel) in enumerate(branch):
                strided = self.stride > 1 and number == len(branch) - 1
                end = (self.stride, "VALID") if strided else (1, "SAME")
                forks = (
                    [(name, kernel)] if isinstance(name, str) else zip(name, kernel, strict=True)
                )
                ys = [Unit(features, k, *end, name=n)(y, train, valid) for n, k in forks]
                y = jnp.concatenate(ys, axis=-1)
            parts.append(y)
        return jnp.concatenate(parts, axis=-1)


class InceptionV3(nn.Module):
    """The network, and as a backbone.

    Attributes:
      num_classes: length of the logits; 1008 for the weights of the FID.
      variant: "fid" or "torchvision".
    """

    num_classes: int = 1008
    variant: str = "fid"

    def __post_init__(self):
        check_choices(self, variant=VARIANTS)
        check_at_least(self, num_classes=1)
        super().__post_init__()

    @property
    def is_of_fid(self) -> bool:
        """Whether the Frechet distance of its features may be called FID."""
        return self.variant == "fid" and self.num_classes == 1008

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the image for one of the map, but for what the borders take."""
        return {"stage1": 8, "stage2": 16, "stage3": 32}

    def features(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """The maps before each halving, of 288, 768 and 2048 channels.

        `x` are images [b, h, w, 3] in [-1, 1], of at least 75 x 75 pixels; the weights are of 299.
        (Torchvision's `transform_input` turns its usual normalization into this range.)
        In training the norms' statistics are those of the rows that are `valid`, bool [b], alone;
        at least one must be True, else they are NaN.
        """
        return self._layers(x, train, valid, False)[0]

    def __call__(
        self, x: jax.Array, *, train: bool = False, valid: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits, float32 [b, num_classes]; the arguments are those of `features`."""
        return self._layers(x, train, valid, True)[1]

    @nn.compact
    def _layers(
        self, x: jax.Array, train: bool, valid: jax.Array | None, with_head: bool
    ) -> tuple[dict[str, jax.Array], jax.Array | None]:
        of_fid, maps = self.variant == "fid", {}
        for name, features, size, stride, padding in (
            ("1a_3x3", 32, 3, 2, "VALID"), ("2a_3x3", 32, 3, 1, "VALID"),
            ("2b_3x3", 64, 3, 1, "SAME"), ("pool", 64, 3, 2, "VALID"),
            ("3b_1x1", 80, 1, 1, "VALID"), ("4a_3x3", 192, 3, 1, "VALID"),
            ("pool", 192, 3, 2, "VALID"),
        ):  # fmt: skip
            if name == "pool":
                x = nn.max_pool(x, (size, size), (stride, stride))
            else:
                unit = Unit(features, (size, size), stride, padding, name=f"conv2d_{name}")
                x = unit(x, train, valid)
        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = Mixed(_block_5(pooled), "mean", of_fid, name=f"mixed_{name}")(x, train, valid)
        maps["stage1"] = x
        x = Mixed(REDUCTION_6, "maximum", of_fid, 2, name="mixed_6a")(x, train, valid)
        for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = Mixed(_block_6(inner), "mean", of_fid, name=f"mixed_{name}")(x, train, valid)
        maps["stage2"] = x
        x = Mixed(REDUCTION_7, "maximum", of_fid, 2, name="mixed_7a")(x, train, valid)
        x = Mixed(BLOCK_7, "mean", of_fid, name="mixed_7b")(x, train, valid)
        x = Mixed(BLOCK_7, "maximum" if of_fid else "mean", of_fid, name="mixed_7c")(
            x, train, valid
        )
        maps["stage3"] = x
        logits = nn.Dense(self.num_classes, name="head")(x.mean((1, 2))) if with_head else None
        return maps, logits
