"""Image augmentation on the device: what the host leaves out after decoding and cropping.

Flip, color jitter, grayscale, blur and normalization run inside the training step on uint8
images. Each example has its own key, folded from the step's key and the example's place in the
global batch, so the result does not depend on how the batch is sharded. An operation whose
probability is 0 is not traced at all.

The operations work on one image as three planes, float [3, H, W] in 0..1: with the colors last,
a CPU spends five times as long on them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from declip_jax.section import Section, between

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL and torchvision convert to gray


class View(Section):
    """A section of `config.views`; configs/common.py tells of each field."""

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float = between(0, 1)
    jitter: tuple[float, float, float, float]
    jitter_prob: float = between(0, 1)
    grayscale_prob: float = between(0, 1)
    blur_prob: float = between(0, 1)
    blur_sigma: tuple[float, float]

    def check(self, where: str) -> None:
        jitter = self.jitter
        if min(jitter) < 0 or max(jitter) > 1 or jitter[3] > 0.5:
            raise ValueError(
                f"{where}.jitter={jitter} must be four strengths from 0: brightness, contrast and "
                "saturation up to 1, hue up to 0.5."
            )
        for field, highest in (("crop_scale", 1.0), ("crop_ratio", None), ("blur_sigma", None)):
            low, high = getattr(self, field)
            if not 0 < low <= high or (highest and high > highest):
                raise ValueError(
                    f"{where}.{field}={(low, high)} must be (low, high) with 0.0 < low <= high"
                    + (f" <= {highest}." if highest else ".")
                )


def augment(key: jax.Array, images: jax.Array, views: Sequence[View], mean, std) -> jax.Array:
    """Augments every view of a batch with the step's key, and normalizes: uint8 [B, V, H, W, 3] ->
    float32 of that shape. `views` are in the order of axis 1; means and deviations in 0..1.
    """
    example_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
    out = []
    for v, view in enumerate(views):
        keys = jax.vmap(jax.random.fold_in, (0, None))(example_keys, v)
        pixels = jnp.moveaxis(images[:, v], -1, 1).astype(jnp.float32) / 255  # [B, 3, H, W]
        pixels = jax.vmap(lambda k, x, view=view: _augment_one(k, x, view))(keys, pixels)
        out.append(jnp.moveaxis(pixels, 1, -1))
    return normalize(jnp.stack(out, axis=1), mean, std)


def normalize(pixels: jax.Array, mean, std) -> jax.Array:
    """(pixels - mean) / std on the last axis; `pixels` float in 0..1."""
    return (pixels - jnp.asarray(mean)) / jnp.asarray(std)


def _augment_one(key: jax.Array, image: jax.Array, view: View) -> jax.Array:
    """Draws and applies the view's operations on one image."""

    def maybe(name, probability, operation, image):
        if not probability:
            return image
        choice, inner = jax.random.split(jax.random.fold_in(key, name))
        return jnp.where(jax.random.bernoulli(choice, probability), operation(inner, image), image)

    def jitter(key, image):
        keys = jax.random.split(key, 4)
        shifts = [
            jax.random.uniform(k, (), minval=-strength, maxval=strength)
            for k, strength in zip(keys, view.jitter, strict=True)
        ]
        return jitter_colors(image, *shifts)

    def blur(key, image):
        low, high = view.blur_sigma
        sigma = jax.random.uniform(key, (), minval=low, maxval=high)
        return gaussian_blur(image, sigma, radius=int(3 * high + 0.5))

    image = maybe(0, view.flip, lambda _, x: x[:, :, ::-1], image)
    image = maybe(1, view.jitter_prob, jitter, image)
    image = maybe(2, view.grayscale_prob, lambda _, x: jnp.broadcast_to(gray(x), x.shape), image)
    return maybe(3, view.blur_prob, blur, image)


def gray(image: jax.Array) -> jax.Array:
    """Luminance [H, W]."""
    # Written out: XLA vectorizes no sum over so short an axis on a CPU.
    return LUMA[0] * image[0] + LUMA[1] * image[1] + LUMA[2] * image[2]


def jitter_colors(image: jax.Array, brightness, contrast, saturation, hue) -> jax.Array:
    """torchvision's adjust_brightness, _contrast and _saturation by 1 + shift, then _hue."""

    def blend(image, other, shift):  # a factor of 1 + shift: 0 gives `other`, 1 the image
        return jnp.clip(other + (1 + shift) * (image - other), 0.0, 1.0)

    image = blend(image, 0.0, brightness)
    image = blend(image, gray(image).mean(), contrast)
    image = blend(image, gray(image), saturation)
    return shift_hue(image, hue)


def shift_hue(image: jax.Array, shift: jax.Array) -> jax.Array:
    """Turns the hue by `shift` (1 is the whole circle), through HSV and back."""
    r, g, b = image
    value = jnp.maximum(jnp.maximum(r, g), b)
    chroma = value - jnp.minimum(jnp.minimum(r, g), b)
    # In sixths of the circle: 0 at red, 2 at green, 4 at blue.
    nearest = jnp.where(value == r, 0.0, jnp.where(value == g, 2.0, 4.0))
    difference = jnp.where(value == r, g - b, jnp.where(value == g, b - r, r - g))
    hue = nearest + difference / jnp.where(chroma > 0, chroma, 1.0) + 6 * shift

    # HSV to RGB without branches: channel n is value - chroma · clip(min(k, 4 - k), 0, 1),
    # k = (n + hue) mod 6, for n = 5, 3, 1
    def channel(n):
        k = n + hue
        k = k - 6 * jnp.floor(k / 6)  # a fifth of the time of %
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)

    return jnp.stack([channel(5), channel(3), channel(1)])


def gaussian_blur(image: jax.Array, sigma: jax.Array, radius: int) -> jax.Array:
    """Gaussian blur of standard deviation `sigma` pixels, cut off `radius` pixels away.

    Edges are continued with their own pixels. Pillow's filter, which the published programs use,
    draws near this by three box filters: on photographs the two differ by one gray level of 255 in
    the mean.
    """
    taps = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    for axis in (1, 2):
        size = image.shape[axis]
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        # The barrier keeps XLA from computing every pixel once for each tap that reads it.
        padded = jax.lax.optimization_barrier(jnp.pad(image, padding, mode="edge"))
        image = sum(
            taps[t] * jax.lax.slice_in_dim(padded, t, t + size, axis=axis)
            for t in range(2 * radius + 1)
        )
    return image
