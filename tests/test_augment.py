import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from configs import common
from declip_jax import augment
from declip_jax.data.scenes import Scenes

KEY = jax.random.PRNGKey(0)


def view(**changes):
    weak = common.get_config().unlock().views.weak
    weak.update(changes)
    return weak


def images(batch=16, size=12):
    return np.random.default_rng(0).integers(0, 256, (batch, 1, size, size, 3)).astype(np.uint8)


def run(x, v, key=KEY):
    return np.asarray(jax.jit(lambda k, x: augment.augment(k, x, [v], 0.0, 1.0))(key, x))


def test_no_operation_leaves_the_pixels():
    x = images()
    np.testing.assert_allclose(run(x, view()), x / 255, atol=1e-7)


def test_normalization():
    x = images()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    ours = augment.augment(KEY, jnp.asarray(x), [view()], mean, std)
    np.testing.assert_allclose(ours, (x / 255 - mean) / std, rtol=2e-5, atol=1e-6)


def test_flip_turns_half_of_the_images():
    x = images(200)
    out = run(x, view(flip=0.5))
    turned = [np.allclose(o, i[:, :, ::-1] / 255, atol=1e-6) for o, i in zip(out, x, strict=True)]
    kept = [np.allclose(o, i / 255, atol=1e-6) for o, i in zip(out, x, strict=True)]
    assert all(np.logical_xor(turned, kept))
    assert 70 < sum(turned) < 130


def test_gray_has_equal_channels_and_the_luminance():
    x = images()
    out = run(x, view(grayscale_prob=1.0))
    luminance = (x / 255) @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(out, np.repeat(luminance[..., None], 3, -1), atol=1e-6)


def apply(operation, image, *args):
    """On uint8 [H, W, 3], back in 0 … 255."""
    planes = jnp.moveaxis(jnp.asarray(image), -1, 0) / 255
    return 255 * np.moveaxis(np.asarray(jax.jit(operation)(planes, *args)), 0, -1)


@pytest.mark.parametrize("shift", [-0.4, -0.1, 0.3])
@pytest.mark.parametrize(
    "place, enhance",
    [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
)
def test_colors_agree_with_pillow(place, enhance, shift):
    image = Scenes("train")[3]["image"]
    shifts = [0.0] * 4
    shifts[place] = shift
    pillow = np.asarray(enhance(Image.fromarray(image)).enhance(1 + shift))
    ours = apply(augment.jitter_colors, image, *shifts)
    # Pillow cuts to whole gray levels, and contrast starts from a mean that was rounded.
    assert np.abs(ours - pillow).max() < 1.3
    assert np.abs(ours - image).max() > 5  # more than it could be wrong by


def test_hue_shift_agrees_with_colorsys():
    pixels = np.random.default_rng(1).random((3, 5, 5)).astype(np.float32)
    pixels[:, 0, 0] = 0.5  # gray: no hue to turn
    for shift in (-0.5, -0.4, 0.1, 0.5):
        ours = np.asarray(jax.jit(augment.shift_hue)(pixels, shift))
        for i, j in np.ndindex(5, 5):
            h, s, v = colorsys.rgb_to_hsv(*map(float, pixels[:, i, j]))
            expected = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
            np.testing.assert_allclose(ours[:, i, j], expected, atol=2e-6)


def test_jitter_stays_in_range_and_varies_by_example():
    x = np.repeat(images(1), 32, axis=0)
    out = run(x, view(jitter_prob=0.5))
    assert out.min() >= 0 and out.max() <= 1
    changed = [not np.allclose(o, x[0] / 255, atol=1e-6) for o in out]
    assert 6 < sum(changed) < 26
    assert len({o.tobytes() for o in out}) == 1 + sum(changed)


def test_blur_keeps_the_mean_and_takes_away_detail():
    x = images(8, size=32)
    out = run(x, view(blur_prob=1.0, blur_sigma=(1.0, 2.0)))
    flat = np.full_like(x, 77)
    np.testing.assert_allclose(run(flat, view(blur_prob=1.0)), flat / 255, atol=1e-6)
    assert (np.diff(out, axis=2) ** 2).mean() < 0.1 * (np.diff(x / 255.0, axis=2) ** 2).mean()


@pytest.mark.parametrize("sigma, most", [(0.1, 0.1), (0.4, 1.2), (0.7, 1.2), (1, 0.7), (2, 0.7)])
def test_blur_agrees_with_pillow(sigma, most):
    """Pillow's filter, the published programs', is three box filters that come near a Gaussian."""
    image = Scenes("train")[3]["image"]
    pillow = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
    ours = apply(lambda x, s: augment.gaussian_blur(x, s, radius=6), image, sigma)
    assert np.abs(ours - pillow).mean() < most  # gray levels, of which Pillow rounds off half a one
    assert sigma < 0.5 or np.abs(ours - image).mean() > 2 * most


def test_blur_is_a_gaussian():
    image = jnp.zeros((3, 31, 31)).at[:, 15, 15].set(1.0)
    row, column = np.mgrid[:31, :31] - 15
    for sigma in (0.6, 1.0, 2.0):
        ours = jax.jit(lambda x, s: augment.gaussian_blur(x, s, radius=6))(image, sigma)
        expected = np.exp(-(row**2 + column**2) / (2 * sigma**2))
        expected[(np.abs(row) > 6) | (np.abs(column) > 6)] = 0
        np.testing.assert_allclose(ours[1], expected / expected.sum(), atol=1e-6)


def test_same_key_same_result_and_another_key_another():
    x, v = images(), view(flip=0.5, jitter_prob=0.8)
    np.testing.assert_array_equal(run(x, v), run(x, v))
    assert not np.array_equal(run(x, v), run(x, v, jax.random.PRNGKey(1)))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"flip": 1.5}, "config.views.weak.flip=1.5"),
        ({"jitter": (0.4, 0.4, 0.4, 0.9)}, "config.views.weak.jitter"),
        ({"jitter": (0.4, 1.4, 0.4, 0.1)}, "config.views.weak.jitter"),
        ({"crop_scale": (0.9, 0.5)}, "config.views.weak.crop_scale"),
        ({"crop_scale": (0.5, 1.5)}, "config.views.weak.crop_scale"),
        ({"blur_sigma": (0.0, 2.0)}, "config.views.weak.blur_sigma"),
    ],
)
def test_settings_out_of_range_are_named(changes, named):
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        augment.View.read(view(**changes), "config.views.weak")
