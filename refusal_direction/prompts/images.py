"""Making any image fit to be shown to a model, or saying that it cannot be."""

from __future__ import annotations

import struct

import numpy
from PIL import Image, ImageOps

__all__ = ["DAMAGED", "UnusableImageError", "usable"]

_MOST_ELONGATED = 100
"""Some processors refuse what is longer."""
_RANGES = {"I": (255, 65535), "F": (1, 255, 65535)}
"""Of grey values by Pillow's mode."""
_LONGEST_SIDE = 2048
"""Processors scale further down; this only keeps a 10,000 pixel wide panorama from filling memory."""


DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on files that are no whole image."""


class UnusableImageError(Exception):
    """The image is truncated, empty, or not an image. Never reaches the user: whoever reads images counts these in a warning."""


def usable(image: Image.Image) -> Image.Image:
    """The image's first frame, upright, in RGB on white, its longer side at most 2048 pixels.

    Raises UnusableImageError where nothing can be shown.
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
    """Grey values of more than a byte, scaled to one: Pillow would cut them off.

    By the first of the usual ranges that holds them all; numbers of no usual range by their own least and largest.
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
