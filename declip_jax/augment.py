"""Image augmentation on the device: what the host leaves out after decoding and cropping.

Flip, colour jitter, greyscale, blur and normalisation run inside the training step on uint8
images. Each example has its own key, folded from the step's key and the example's place in the
global batch, so the result does not depend on how the batch is sharded. An operation whose
probability is 0 is not traced at all.
"""

import jax
import jax.numpy as jnp

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL and torchvision convert to grey


def check_view(name: str, view) -> None:
    """Raises ValueError naming the field of `config.views.<name>` that is out of range."""
    for field in ("flip", "jitter_prob", "grey_prob", "blur_prob"):
        if not 0 <= view[field] <= 1:
            raise ValueError(
                f"config.views.{name}.{field}={view[field]} is a probability: 0 to 1 is expected."
            )
    if len(view.jitter) != 4 or min(view.jitter) < 0 or view.jitter[3] > 0.5:
        raise ValueError(
            f"config.views.{name}.jitter={view.jitter} must be four strengths >= 0: brightness, "
            "contrast, saturation and hue, the last at most 0.5."
        )
    for field, low, high in (
        ("crop_scale", 0.0, 1.0),
        ("crop_ratio", 0.0, None),
        ("blur_sigma", 0.0, None),
    ):
        first, last = view[field]
        if not (low < first <= last and (high is None or last <= high)):
            raise ValueError(
                f"config.views.{name}.{field}={tuple(view[field])} must be (low, high) with "
                f"{low} < low <= high" + (f" <= {high}." if high is not None else ".")
            )


def augment(key: jax.Array, images: jax.Array, views, mean, std) -> jax.Array:
    """Augments and normalises every view of a batch.

    Args:
      key: the step's key.
      images: uint8 [B, V, H, W, 3].
      views: V views of the config, in the order of axis 1.
      mean: three channel means in 0..1.
      std: three channel deviations in 0..1.

    Returns:
      float32 [B, V, H, W, 3].
    """
    example_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
    out = []
    for v, view in enumerate(views):
        keys = jax.vmap(jax.random.fold_in, (0, None))(example_keys, v)
        pixels = images[:, v].astype(jnp.float32) / 255
        out.append(jax.vmap(lambda k, x, view=view: _augment_one(k, x, view))(keys, pixels))
    return normalise(jnp.stack(out, axis=1), mean, std)


def normalise(pixels: jax.Array, mean, std) -> jax.Array:
    """(pixels - mean) / std on the last axis; `pixels` float in 0..1."""
    return (pixels - jnp.asarray(mean)) / jnp.asarray(std)


def _augment_one(key: jax.Array, image: jax.Array, view) -> jax.Array:
    """One example, float [H, W, 3] in 0..1. torchvision's operations, jitter in a fixed order."""

    def maybe(name, probability, operation, image):
        if not probability:
            return image
        choice, inner = jax.random.split(jax.random.fold_in(key, name))
        return jnp.where(jax.random.bernoulli(choice, probability), operation(inner, image), image)

    image = maybe(0, view.flip, lambda _, x: x[:, ::-1], image)
    image = maybe(1, view.jitter_prob, lambda k, x: colour_jitter(k, x, view.jitter), image)
    image = maybe(2, view.grey_prob, lambda _, x: jnp.broadcast_to(grey(x), x.shape), image)
    image = maybe(3, view.blur_prob, lambda k, x: gaussian_blur(k, x, view.blur_sigma), image)
    return image


def grey(image: jax.Array) -> jax.Array:
    """[H, W, 3] -> luminance [H, W, 1]."""
    return (image * jnp.asarray(LUMA)).sum(axis=-1, keepdims=True)


def colour_jitter(key: jax.Array, image: jax.Array, strengths) -> jax.Array:
    """torchvision's ColorJitter with `strengths` (brightness, contrast, saturation, hue)."""
    brightness, contrast, saturation, hue = (
        jax.random.uniform(k, (), minval=-1.0, maxval=1.0) * strength
        for k, strength in zip(jax.random.split(key, 4), strengths, strict=True)
    )

    def blend(image, other, shift):  # a factor of 1 + shift: 0 gives `other`, 1 the image
        return jnp.clip(other + (1 + shift) * (image - other), 0.0, 1.0)

    image = blend(image, 0.0, brightness)
    image = blend(image, grey(image).mean(), contrast)
    image = blend(image, grey(image), saturation)
    return shift_hue(image, hue) if strengths[3] else image


def shift_hue(image: jax.Array, shift: jax.Array) -> jax.Array:
    """Turns the hue by `shift` (1 is the whole circle), through HSV and back."""
    value = image.max(axis=-1)
    chroma = value - image.min(axis=-1)
    r, g, b = jnp.moveaxis(image, -1, 0)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    hue = jnp.where(
        value == r, (g - b) / safe, jnp.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )  # in sixths of the circle
    hue = hue + 6 * shift
    # HSV to RGB without branches: channel n is value - chroma · clip(min(k, 4 - k), 0, 1),
    # k = (n + hue) mod 6, for n = 5, 3, 1
    k = (jnp.asarray([5.0, 3.0, 1.0]) + hue[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)


def gaussian_blur(key: jax.Array, image: jax.Array, sigmas) -> jax.Array:
    """Gaussian blur with a standard deviation drawn evenly from `sigmas` (in pixels)."""
    sigma = jax.random.uniform(key, (), minval=sigmas[0], maxval=sigmas[1])
    radius = int(3 * sigmas[1] + 0.5)
    taps = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    for axis in (0, 1):
        size = image.shape[axis]
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = jnp.pad(image, padding, mode="edge")
        image = sum(
            taps[t] * jax.lax.slice_in_dim(padded, t, t + size, axis=axis)
            for t in range(2 * radius + 1)
        )
    return image
