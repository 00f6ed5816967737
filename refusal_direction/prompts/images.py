"""Normalising images for a model's processor."""

from __future__ import annotations

import struct

import numpy
from PIL import Image, ImageOps

__all__ = ["DAMAGED", "UnusableImageError", "usable"]

_MOST_ELONGATED = 100
"""Largest ratio of the sides; some processors refuse longer images."""
_RANGES = {"I": (255, 65535), "F": (1, 255, 65535)}
"""Usual maxima of grey values by Pillow mode."""
_LONGEST_SIDE = 2048
"""In pixels. Processors scale further down; this keeps a panorama of 10,000 pixels from filling memory."""


DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""Exceptions of Pillow for damaged files."""


class UnusableImageError(Exception):
    """The image is truncated, empty, or not an image. Internal: readers of images count these in a warning."""


def usable(image: Image.Image) -> Image.Image:
    """The image's first frame, upright, in RGB on white, its longer side at most 2048 pixels.

    Raises UnusableImageError if it cannot be read.
    """
    try:
        if min(image.size) == 0:
            raise UnusableImageError("it has no pixels")
        if max(image.size) > _MOST_ELONGATED * min(image.size):
            raise UnusableImageError(f"it is more than {_MOST_ELONGATED} times as long as wide")
        image.seek(0)
        image.load()
        upright = _in_bytes(ImageOps.exif_transpose(image))
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        shown = upright.convert("RGB")
        if max(shown.size) > _LONGEST_SIDE:
            shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        return shown
    except DAMAGED as error:
        raise UnusableImageError(str(error)) from error


def _in_bytes(image: Image.Image) -> Image.Image:
    """Scale grey values of more than a byte to one byte; Pillow would clip them.

    The range is the first usual one that holds all values, otherwise their own minimum and maximum.
    """
    ranges = _RANGES.get(image.mode.partition(";")[0])
    if ranges is None:
        return image
    values = numpy.nan_to_num(numpy.asarray(image, dtype=numpy.float64), posinf=0.0, neginf=0.0)
    least, largest = float(values.min()), float(values.max())
    full = 65535 if image.mode.startswith("I;16") else next((full for full in ranges if largest <= full), None)
    if full is not None and least >= 0:
        least, largest = 0.0, float(full)
    shown = (values - least) * (255 / max(largest - least, 1e-30))
    return Image.fromarray(numpy.rint(shown).astype(numpy.uint8))
