"""Decoding, random-resized-crop and evaluation crops, on the host. Images are RGB uint8 [H, W, 3].

Wherever an image is taken, it is either encoded (bytes) or already such an array.
"""

import math
import struct
from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

# One image is too little work to share out; the pipeline decodes many at a time.
cv2.setNumThreads(1)

MAX_PIXELS = 64 * 2**20  # of an encoded image; a small file can claim any size

Box = tuple[int, int, int, int]  # top, left, bottom, right


def size(image: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width of an image, for encoded ones from the header alone.

    Raises:
      ValueError: not a JPEG, PNG, WebP, GIF or BMP, or more than MAX_PIXELS.
    """
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    try:
        height, width = header_size(image)
    except struct.error as error:
        raise ValueError(f"image header is cut off: {len(image)} bytes") from error
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"image of {width} x {height} pixels: expected 1 to {MAX_PIXELS:,} pixels")
    return height, width


def header_size(data: bytes) -> tuple[int, int]:
    """Height and width that an encoded image claims, of any size; see `size` for the errors."""
    if _is_jpeg(data):
        return simplejpeg.decode_jpeg_header(data)[:2]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack_from(">II", data, 16)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        width, height = struct.unpack_from("<HH", data, 6)
    elif data.startswith(b"BM"):
        width, height = struct.unpack_from("<ii", data, 18)
        height = abs(height)  # negative: stored from the top
    elif data.startswith(b"RIFF") and data[8:15] == b"WEBPVP8":
        kind = data[15:16]
        if kind == b"X":  # 24 bits each, minus one
            low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
            width = (high_width << 16) + low_width + 1
            height = (high_height << 16) + low_height + 1
        elif kind == b"L":  # 14 bits each, minus one
            (bits,) = struct.unpack_from("<I", data, 21)
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        else:  # 14 bits each, with two bits of scaling above
            width, height = (v & 0x3FFF for v in struct.unpack_from("<HH", data, 26))
    else:
        raise ValueError(
            f"not an image that can be read (it starts with {data[:8]!r}): expected JPEG, PNG, "
            "WebP, GIF or BMP"
        )
    return height, width


def _is_jpeg(image: bytes | np.ndarray) -> bool:
    return isinstance(image, bytes) and image.startswith(b"\xff\xd8")


def decode(image: bytes | np.ndarray, shrink: int = 1) -> np.ndarray:
    """Decodes to uint8 [ceil(H / shrink), ceil(W / shrink), 3] RGB.

    Grey and CMYK become RGB, alpha is dropped, 16 bits become 8.

    Args:
      image: an encoded image, or an array, which is returned as it is.
      shrink: 1; for JPEG also 2, 4 or 8, which leaves most of the decoding out.

    Raises:
      ValueError: see `size`; or the data are cut off or damaged.
    """
    if isinstance(image, np.ndarray):
        return image
    height, width = size(image)
    if _is_jpeg(image):
        # Strict, because libjpeg otherwise paints what is missing grey. The bounds keep it from
        # choosing a factor between, like 3/8, whose pixels would lie across the crop's edges.
        return simplejpeg.decode_jpeg(
            image,
            min_factor=shrink,
            min_height=-(-height // shrink),
            min_width=-(-width // shrink),
            strict=True,
        )
    # The size is that of the header, so orientation tags must not turn the image.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
    if pixels is None or pixels.shape[:2] != (height, width):
        raise ValueError(f"image of {width} x {height} pixels is cut off or damaged")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def random_resized_crop(
    image: bytes | np.ndarray, views: Sequence, rng: np.random.Generator, resolution: int
) -> np.ndarray:
    """Random crops resized to a square, all from one decoding.

    As torchvision's RandomResizedCrop with antialiasing, but crops of large JPEGs are moved to
    multiples of the factor, 2, 4 or 8, by which these are decoded smaller.

    Args:
      image: encoded, or an array.
      views: V objects with crop_scale, the (lowest, highest) share of the image's area, and
        crop_ratio, the (lowest, highest) width / height.
      rng: source of all randomness.
      resolution: R, pixels.

    Returns:
      uint8 [V, R, R, 3].

    Raises:
      ValueError: see `decode`.
    """
    height, width = size(image)
    boxes = [_sample_box(height, width, view.crop_scale, view.crop_ratio, rng) for view in views]
    shrink = 1
    if _is_jpeg(image):
        smallest = min(min(bottom - top, right - left) for top, left, bottom, right in boxes)
        shrink = max(k for k in (1, 2, 4, 8) if k == 1 or smallest >= k * resolution)
    pixels = decode(image, shrink)
    crops = np.empty((len(boxes), resolution, resolution, 3), np.uint8)
    for crop, box in zip(crops, boxes, strict=True):
        top, left, bottom, right = (round(edge / shrink) for edge in box)
        crop[:] = resize(pixels[top:bottom, left:right], resolution, resolution)
    return crops


def _sample_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, top + box_height, left + box_width
    # The image is much longer than wide, or the reverse: the largest allowed crop of its centre.
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return top, left, top + box_height, left + box_width


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [height, width, 3], antialiased."""
    # Area averaging keeps fine patterns from aliasing but is coarse when it enlarges; an image may
    # need the one along one side and the other along the other.
    smaller = (min(width, image.shape[1]), min(height, image.shape[0]))
    image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def resize_centre_crop(image: bytes | np.ndarray, short_side: int, resolution: int) -> np.ndarray:
    """For evaluation: the short side resized, then the square of the centre, uint8 [R, R, 3].

    Args:
      image: encoded, or an array.
      short_side: pixels, at least `resolution`.
      resolution: R, pixels.

    Raises:
      ValueError: see `decode`.
    """
    pixels = decode(image)
    short = min(pixels.shape[:2])
    # Only the middle of a long strip matters, and scaled up as a whole it might not fit in memory.
    pixels = _centre(pixels, min(pixels.shape[0], 4 * short), min(pixels.shape[1], 4 * short))
    height, width = (side * short_side // short for side in pixels.shape[:2])
    return _centre(resize(pixels, height, width), resolution, resolution)


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]
