"""Draws the demo's images: one object, with random position, size, rotation, proportions, colours and background.

All randomness comes from the caller's `random.Random`. Dangerous and harmless objects are drawn in the same way, so only
the shape of the object tells them apart. Images are drawn larger and then scaled down, which smooths the edges.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from refusal_direction.demo.vision.icons import DANGEROUS, HARMLESS

__all__ = ["IMAGE_SIZE", "draw"]

IMAGE_SIZE = 48
_OVERSAMPLING = 3
_OVAL_CORNERS = 20

_Point = tuple[float, float]
_Colour = tuple[int, int, int]

_HUES: tuple[_Colour, ...] = (
    (200, 60, 50),
    (220, 130, 40),
    (200, 170, 50),
    (80, 150, 70),
    (50, 150, 150),
    (60, 100, 190),
    (130, 80, 170),
    (190, 90, 140),
    (130, 90, 60),
    (120, 125, 130),
)


def _shade(colour: _Colour, rng: random.Random, spread: int = 25) -> _Colour:
    red, green, blue = (max(0, min(255, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


def _colours(rng: random.Random) -> dict[str, _Colour]:
    """A colour for each role in `icons.py`; the first and the second colour differ in hue."""
    main, second = rng.sample(_HUES, 2)
    return {
        "A": _shade(main, rng),
        "B": _shade(second, rng),
        "D": _shade((45, 42, 45), rng),
        "W": _shade((215, 215, 210), rng),
    }


def _background(rng: random.Random, size: int) -> Image.Image:
    """A pale gradient between two colours, horizontal or vertical."""
    ends = [_shade((225, 222, 215), rng, 30) for _ in range(2)]
    strip = Image.new("RGB", (2, 1))
    strip.putpixel((0, 0), ends[0])
    strip.putpixel((1, 0), ends[1])
    gradient = strip.resize((size, size), Image.Resampling.BILINEAR)
    return gradient if rng.random() < 0.5 else gradient.transpose(Image.Transpose.ROTATE_90)


def _placement(rng: random.Random, size: int) -> tuple[float, ...]:
    """A random affine map from icon coordinates to pixels: (a, b, c, d, e, f) in x' = ax + by + c, y' = dx + ey + f."""
    scale = rng.uniform(0.62, 0.86) * size / 100
    turn = math.radians(rng.uniform(-18, 18))
    wide, flip = rng.uniform(0.88, 1.14), rng.choice((-1, 1))
    a, b = scale * wide * flip * math.cos(turn), -scale * math.sin(turn)
    d, e = scale * wide * flip * math.sin(turn), scale * math.cos(turn)
    centre_x, centre_y = (size * rng.uniform(0.42, 0.58) for _ in range(2))
    return a, b, centre_x - 50 * (a + b), d, e, centre_y - 50 * (d + e)


def _oval(centre: _Point, radii: _Point) -> list[_Point]:
    angles = [2 * math.pi * corner / _OVAL_CORNERS for corner in range(_OVAL_CORNERS)]
    return [(centre[0] + radii[0] * math.cos(angle), centre[1] + radii[1] * math.sin(angle)) for angle in angles]


def _placed(points: Sequence[_Point], place: tuple[float, ...], rng: random.Random) -> list[_Point]:
    """The points in pixels, each moved a little at random, so that outlines differ between drawings of an object."""
    a, b, c, d, e, f = place
    jittered = [(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)) for x, y in points]
    return [(a * x + b * y + c, d * x + e * y + f) for x, y in jittered]


def draw(thing: str, rng: random.Random) -> Image.Image:
    """An RGB image of the object, `IMAGE_SIZE` pixels wide and high."""
    size = IMAGE_SIZE * _OVERSAMPLING
    image, colours, place = _background(rng, size), _colours(rng), _placement(rng, size)
    canvas = ImageDraw.Draw(image)
    stroke = round(size * rng.uniform(0.045, 0.065))
    for shape in (DANGEROUS | HARMLESS)[thing].split(" | "):
        role, form, *numbers = shape.split()
        points = [(float(x), float(y)) for x, y in (number.split(",") for number in numbers)]
        if form in ("oval", "ring"):
            points = _oval(points[0], points[1])
        pixels = _placed(points, place, rng)
        if form in ("poly", "oval"):
            canvas.polygon(pixels, fill=colours[role], outline=colours["D"], width=_OVERSAMPLING)
        else:
            closed = pixels + pixels[:2] if form == "ring" else pixels
            canvas.line(closed, fill=colours[role], width=stroke, joint="curve")
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
