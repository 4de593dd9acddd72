import io
import math
import struct
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from declip_jax.data import image

HEIGHT, WIDTH = 61, 83  # odd, so that rounding shows


def view(scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3)):
    return SimpleNamespace(crop_scale=scale, crop_ratio=ratio)


def photograph(height, width):
    """Detail at several scales, the finest of two pixels, as photographs have."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 127.0)
    for cells, contrast in ((4, 50), (16, 25), (64, 12), (min(height, width) // 2, 8)):
        coarse = rng.normal(0, contrast, (cells, cells, 3))
        pixels += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return pixels.clip(0, 255).astype(np.uint8)


def encode(pixels, form, mode="RGB", **options):
    """`pixels` as a file of format `form`, converted to PIL's `mode` before."""
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form, **options)
    return stream.getvalue()


def psnr(a, b):
    return 10 * math.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


FILES = {
    "jpeg": ("JPEG", "RGB", {"quality": 95}, 1),
    "jpeg progressive": ("JPEG", "RGB", {"quality": 95, "progressive": True}, 1),
    "jpeg 4:4:4": ("JPEG", "RGB", {"quality": 95, "subsampling": 0}, 1),
    "jpeg gray": ("JPEG", "L", {"quality": 95}, 1),
    "jpeg cmyk": ("JPEG", "CMYK", {"quality": 95}, 2),
    "png": ("PNG", "RGB", {}, 0),
    "png alpha": ("PNG", "RGBA", {}, 0),
    "png gray": ("PNG", "L", {}, 0),
    "png gray alpha": ("PNG", "LA", {}, 0),
    "png palette": ("PNG", "P", {}, 0),
    "png palette alpha": ("PNG", "P", {"transparency": 0}, 0),
    "png two colors": ("PNG", "1", {}, 0),
    "webp": ("WEBP", "RGB", {"quality": 95}, 2),
    "webp lossless": ("WEBP", "RGB", {"lossless": True}, 0),
    "webp alpha": ("WEBP", "RGBA", {"lossless": True}, 0),
    "gif": ("GIF", "P", {}, 0),
    "bmp": ("BMP", "RGB", {}, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_decodes_to_rgb(name):
    form, mode, options, tolerance = FILES[name]
    encoded = encode(photograph(HEIGHT, WIDTH), form, mode, **options)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)

    assert image.size(encoded) == (HEIGHT, WIDTH)
    decoded = image.decode(encoded)
    assert decoded.shape == (HEIGHT, WIDTH, 3) and decoded.dtype == np.uint8
    assert np.abs(decoded - expected).mean() <= tolerance


@pytest.mark.parametrize("colors", [3, 1])
def test_sixteen_bits_become_eight(colors):
    pixels = photograph(HEIGHT, WIDTH)[..., :colors]
    encoded = cv2.imencode(".png", pixels[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    assert np.abs(image.decode(encoded).astype(int) - pixels).max() <= 1


def test_what_is_transparent_keeps_its_color():
    pixels = np.dstack([photograph(HEIGHT, WIDTH), np.zeros((HEIGHT, WIDTH), np.uint8)])
    encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    np.testing.assert_array_equal(image.decode(encoded), pixels[..., :3])


@pytest.mark.parametrize("transform", [None, 0, 2])
def test_the_kinds_of_cmyk_jpegs(transform):
    """Without Adobe's segment, and with it saying CMYK and YCCK: all store the inverse of ink."""
    pixels = np.array(Image.fromarray(photograph(HEIGHT, WIDTH)).convert("CMYK"))
    pixels[..., 3] = pixels[..., :3].min(axis=-1)
    pixels[..., :3] -= pixels[..., 3:]
    stream = io.BytesIO()
    Image.fromarray(pixels, mode="CMYK").save(stream, "JPEG", quality=95)
    encoded = stream.getvalue()
    adobe = encoded.index(b"\xff\xee\x00\x0eAdobe")
    after = encoded[adobe + 16 :]
    if transform is None:
        encoded = encoded[:adobe] + after
    else:
        encoded = encoded[: adobe + 15] + bytes([transform]) + after
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    assert np.abs(image.decode(encoded) - expected).mean() <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_images_are_turned_as_their_exif_says(form, orientation, order):
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F], exif[0x0112] = "a maker, whose tag comes before", orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "PNG": {}}[form]
    encoded = encode(photograph(HEIGHT, WIDTH), form, exif=exif.tobytes(), **lossless)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))

    decoded = image.decode(encoded)
    assert decoded.shape[:2] == image.size(encoded) == expected.shape[:2]
    assert np.abs(decoded.astype(int) - expected).mean() <= (form == "JPEG")
    crops, evaluation = (
        [
            image.random_resized_crop(one, [view()] * 2, np.random.default_rng(0), 32),
            image.resize_center_crop(one, 20, 16),
        ]
        for one in (encoded, np.ascontiguousarray(decoded))
    )
    np.testing.assert_array_equal(crops[0], evaluation[0])
    np.testing.assert_array_equal(crops[1], evaluation[1])


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_jpegs_are_shrunk_too(orientation):
    # 1537 rows do not divide by 8: mirrored, a reduced row that stands for one of them comes first.
    encoded = encode(photograph(1537, 2047), "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = orientation
    tag = exif.tobytes()
    segment = b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag
    turned = encoded[:2] + segment + encoded[2:]
    views = [view(scale=(0.4, 0.6))] * 2
    shrunk = image.random_resized_crop(turned, views, np.random.default_rng(1), 96)
    full = np.ascontiguousarray(image.decode(turned))
    full = image.random_resized_crop(full, views, np.random.default_rng(1), 96)
    for a, b in zip(shrunk, full, strict=True):
        assert psnr(a, b) >= 30


def exif_block(*entries, order="<", count=None, start=8):
    magic = b"II*\0" if order == "<" else b"MM\0*"
    block = magic + struct.pack(order + "I", start)
    block += struct.pack(order + "H", len(entries) if count is None else count)
    return block + b"".join(struct.pack(order + "HHIHH", *entry) for entry in entries)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II*\0",
        b"JPEG",
        exif_block(),
        exif_block(count=65_535),
        exif_block((0x0100, 3, 1, 6, 0)),
        exif_block((0x0112, 3, 1, 0, 0)),
        exif_block((0x0112, 3, 1, 9, 0)),
        exif_block((0x0112, 2, 1, 6, 0)),
        exif_block((0x0112, 3, 1, 6, 0))[:-4],
        exif_block((0x0112, 3, 1, 6, 0), start=0xFFFFFFFF),
        exif_block((0x0112, 3, 1, 6, 0), order=">")[:12],
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_turns_nothing(form, block):
    encoded = encode(photograph(HEIGHT, WIDTH), form, exif=b"Exif\0\0" + block)
    assert image.size(encoded) == image.decode(encoded).shape[:2] == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", FILES)
def test_cut_off_files_raise(name):
    form, mode, options, _ = FILES[name]
    encoded = encode(photograph(20, 30), form, mode, **options)
    for length in range(len(encoded)):
        with pytest.raises(ValueError):
            image.decode(encoded[:length])


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_decode_or_raise(name):
    form, mode, options, _ = FILES[name]
    rng = np.random.default_rng(0)
    encoded = encode(photograph(20, 30), form, mode, **options)
    for _ in range(300):
        damaged = bytearray(encoded)
        damaged[rng.integers(rng.choice([40, len(encoded)]))] = rng.integers(256)
        try:
            pixels = image.decode(bytes(damaged))
        except ValueError:
            continue
        assert pixels.shape == (*image.size(bytes(damaged)), 3)


def test_damaged_jpeg_raises():
    # As left by a bad sector: zeros in the middle.
    encoded = encode(photograph(HEIGHT, WIDTH), "JPEG")
    middle = len(encoded) // 2
    with pytest.raises(ValueError):
        image.decode(encoded[:middle] + bytes(64) + encoded[middle + 64 :])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"<html>404</html>", b"RIFF\0\0\0\0WEBPVP8X"])
def test_what_is_no_image_raises(data):
    with pytest.raises(ValueError):
        image.size(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF"])
def test_too_many_pixels_raise_before_decoding(form, monkeypatch):
    claim = 65_000
    encoded = bytearray(encode(photograph(HEIGHT, WIDTH), form))
    if form == "PNG":
        struct.pack_into(">II", encoded, 16, claim, claim)
    elif form == "BMP":
        struct.pack_into("<ii", encoded, 18, claim, -claim)
    elif form == "GIF":
        struct.pack_into("<HH", encoded, 6, claim, claim)
    else:
        start_of_frame = encoded.index(b"\xff\xc0")
        struct.pack_into(">HH", encoded, start_of_frame + 5, claim, claim)
    monkeypatch.setattr(cv2, "imdecode", None)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    for function in (
        image.decode,
        lambda data: image.random_resized_crop(data, [view()], np.random.default_rng(0), 8),
        lambda data: image.resize_center_crop(data, 8, 8),
    ):
        with pytest.raises(ValueError, match="65000 x 65000 pixels"):
            function(bytes(encoded))


def test_a_png_that_claims_a_long_chunk_raises_before_decoding(monkeypatch):
    encoded = bytearray(encode(photograph(HEIGHT, WIDTH), "PNG"))
    struct.pack_into(">I", encoded, encoded.index(b"IDAT") - 4, 0x7FFFFFFF)
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(ValueError, match="cut off"):
        image.decode(bytes(encoded))


def test_too_many_chunks_or_scans_raise_before_decoding(monkeypatch):
    pixels = photograph(HEIGHT, WIDTH)
    png = encode(pixels, "PNG")
    end = png.index(b"IDAT") - 4
    png = png[:end] + (bytes(4) + b"tEXt" + bytes(4)) * 70_000 + png[end:]
    scans = b"\xff\xda\0\x08\x01\x01\0\0\0\0" * 101
    image.decode(encode(pixels, "JPEG") + scans)  # after the end: a phone appends a video there
    monkeypatch.setattr(cv2, "imdecode", None)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    for encoded, what in (
        (png, "more than 65,536"),
        (encode(pixels, "JPEG", progressive=True)[:-2] + scans, "111 scans"),
    ):
        with pytest.raises(ValueError, match=what):
            image.decode(encoded)


def test_a_jpeg_is_shrunk_by_exactly_the_factor():
    for height, width in ((64, 64), (61, 83), (100, 97), (333, 500)):
        encoded = encode(photograph(height, width), "JPEG")
        for factor in (2, 4, 8):
            shape = (math.ceil(height / factor), math.ceil(width / factor), 3)
            assert image.decode(encoded, factor).shape == shape


# Decoded by 1, by 2 and by 4; enlarged.
@pytest.mark.parametrize("height, width", [(375, 500), (768, 1024), (1536, 2048), (150, 200)])
def test_crops_match_an_antialiased_bicubic_resize(height, width):
    encoded = encode(photograph(height, width), "JPEG", quality=95)
    whole = view(scale=(1.0, 1.0), ratio=(width / height,) * 2)
    (crop,) = image.random_resized_crop(encoded, [whole], np.random.default_rng(0), 224)
    decoded = Image.open(io.BytesIO(encoded))
    assert psnr(crop, np.asarray(decoded.resize((224, 224), Image.BICUBIC))) >= 38


@pytest.mark.parametrize("height, width, shrink", [(375, 500, 1), (768, 1024, 2)])
def test_random_crops_match_an_antialiased_bicubic_resize(height, width, shrink):
    encoded = encode(photograph(height, width), "JPEG", quality=95)
    views = [view(scale=(0.5, 1.0))] * 8
    crops = image.random_resized_crop(encoded, views, np.random.default_rng(0), 224)
    boxes, factor = image.sample_boxes(encoded, views, np.random.default_rng(0), 224)
    assert factor == shrink
    decoded = Image.open(io.BytesIO(encoded))
    for crop, (top, left, bottom, right) in zip(crops, boxes, strict=True):
        expected = decoded.resize((224, 224), Image.BICUBIC, box=(left, top, right, bottom))
        assert psnr(crop, np.asarray(expected)) >= 38


def test_crops_of_a_shrunk_jpeg_are_where_they_are_without():
    encoded = encode(photograph(1537, 2047), "JPEG", quality=95)
    views = [view(scale=(0.2, 0.5))] * 4
    shrunk = image.random_resized_crop(encoded, views, np.random.default_rng(1), 96)
    whole = image.decode(encoded)
    full = image.random_resized_crop(whole, views, np.random.default_rng(1), 96)
    other = image.random_resized_crop(whole, views, np.random.default_rng(2), 96)
    for a, b, c in zip(shrunk, full, other, strict=True):
        assert psnr(a, b) >= 35 > psnr(b, c)


def test_crop_boxes_have_the_share_and_ratio_asked_for():
    # Each pixel tells where it is, so a crop's edges can be read off.
    rows, columns = np.mgrid[:200, :250].astype(np.uint8)
    pixels = np.stack([rows, columns, columns], axis=-1)
    rng = np.random.default_rng(0)
    shares, ratios, tops = [], [], []
    for _ in range(300):
        (crop,) = image.random_resized_crop(pixels, [view((0.3, 0.6), (0.5, 2.0))], rng, 128)
        crop = crop.astype(float)
        height = np.ptp(crop[..., 0].mean(axis=1)) * 128 / 127
        width = np.ptp(crop[..., 1].mean(axis=0)) * 128 / 127
        shares.append(height * width / (200 * 250))
        ratios.append(width / height)
        tops.append(crop[..., 0].min())
    assert 0.28 < min(shares) < 0.32 and 0.57 < max(shares) < 0.62
    assert 0.45 < min(ratios) < 0.6 and 1.7 < max(ratios) < 2.1
    # Logarithms of the ratios are uniform, but for boxes that do not fit; so their median is 1.
    assert 0.85 < np.median(ratios) < 1.15
    assert min(tops) <= 3 and max(tops) > 60


@pytest.mark.parametrize("shape", [(10, 1000, 3), (1000, 10, 3), (1, 1, 3)])
def test_an_image_that_no_box_fits_gives_the_center(shape):
    pixels = np.zeros(shape, np.uint8)
    pixels[shape[0] // 2, shape[1] // 2] = 255
    crops = image.random_resized_crop(pixels, [view()], np.random.default_rng(0), 32)
    assert crops.shape == (1, 32, 32, 3)
    assert np.argwhere(crops[0, ..., 0] > 100).mean() == pytest.approx(16, abs=3)


def test_views_differ_and_share_one_decoding(monkeypatch):
    calls = []
    decode_jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *a, **kw: calls.append(kw) or decode_jpeg(*a, **kw)
    )
    encoded = encode(photograph(500, 500), "JPEG")
    views = [view((1.0, 1.0), (1.0, 1.0)), view((0.1, 0.2)), view((0.1, 0.2))]
    crops = image.random_resized_crop(encoded, views, np.random.default_rng(0), 64)
    assert crops.shape == (3, 64, 64, 3) and crops.dtype == np.uint8
    assert psnr(crops[0], crops[1]) < 30 and psnr(crops[1], crops[2]) < 30
    # Small enough a factor for the smallest crop, 158 pixels or more of 500.
    assert [call["min_height"] for call in calls] == [250]


def test_the_same_rng_gives_the_same_crops():
    pixels = photograph(HEIGHT, WIDTH)
    first, again, other = (
        image.random_resized_crop(pixels, [view()] * 2, np.random.default_rng(seed), 32)
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (40, 60)])
def test_resize_center_crop_is_the_usual_evaluation_crop(height, width):
    encoded = encode(photograph(height, width), "PNG")
    crop = image.resize_center_crop(encoded, 128, 112)
    whole = Image.open(io.BytesIO(encoded))
    scaled = (
        (128, int(128 * height / width)) if width < height else (int(128 * width / height), 128)
    )
    left, top = ((side - 112) / 2 for side in scaled)
    left, top = round(left), round(top)
    box = (left, top, left + 112, top + 112)
    assert crop.shape == (112, 112, 3)
    assert psnr(crop, np.asarray(whole.resize(scaled, Image.BICUBIC).crop(box))) >= 38


def test_evaluation_crops_of_a_strip():
    # Scaled as a whole, this would take 3.7 GB.
    pixels = np.zeros((4, 300_000, 3), np.uint8)
    pixels[:, 150_000:] = 255
    crop = image.resize_center_crop(pixels, 128, 112)
    assert crop.shape == (112, 112, 3)
    assert (crop[:, 0] < 10).all() and (crop[:, -1] > 245).all()


@pytest.mark.parametrize("side", range(150, 400, 13))
def test_the_short_side_becomes_what_was_asked_for(side):
    for shape in ((side, side + 40, 3), (side + 40, side, 3)):
        assert image.resize_center_crop(np.zeros(shape, np.uint8), 113, 113).shape == (113, 113, 3)


def test_fine_patterns_do_not_alias():
    stripes = np.zeros((300, 300, 3), np.uint8)
    stripes[:, ::2] = 255
    crop = image.resize_center_crop(stripes, 100, 100)
    assert (
        np.ptp(crop.astype(int)) <= 90
    )  # 255 where pixels are picked; the share of one third is 85
