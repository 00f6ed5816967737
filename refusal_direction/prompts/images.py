"""Making any image fit to be shown to a model, or saying that it cannot be."""

from __future__ import annotations

from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["UnusableImageError", "usable"]

_MOST_ELONGATED = 100
"""Some processors refuse what is longer."""
_LONGEST_SIDE = 2048
"""Processors scale further down; this only keeps a 10,000 pixel wide panorama from filling memory."""


class UnusableImageError(ValueError):
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
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        shown = upright.convert("RGB")
        if max(shown.size) > _LONGEST_SIDE:
            shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        return shown
    except (OSError, SyntaxError, EOFError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UnusableImageError(str(error)) from error
