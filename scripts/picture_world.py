"""The picture world of the built-in model: coloured shapes and their captions. `picture_judge` judges pictures of it.

The world has colours, shapes, backgrounds and two sizes of figures; every combination is a scene with a caption such
as "a large red circle on a white background". Two things are held back from the built-in model, so that a fine-tune
has something to learn: one shape, the ring, under a made-up word, CONCEPT; and every finish but the plain one, so that
a style can be taught.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (222, 38, 38),
    "orange": (250, 140, 20),
    "yellow": (250, 228, 50),
    "green": (40, 165, 60),
    "blue": (35, 75, 225),
    "purple": (145, 45, 175),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (14, 14, 14)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
CONCEPT = "zorbit"
CONCEPT_SHAPE = "ring"
HOLE = 0.5  # radius of the hole in a ring, as a share of the ring's
RADII = {"small": (0.19, 0.23), "large": (0.3, 0.36)}
"""Sizes of figures: the radii drawn for each word, as fractions of the picture's shorter side."""
LARGE_SHARE = 0.7  # of the scenes: what the caption leaves unsaid is large more often than not
FINISHES = ("plain", "outlined", "shaded")
"""How a figure is painted. The built-in model sees plain ones only; a style is taught with the others."""
INK = {"white": (20, 20, 20), "grey": (20, 20, 20), "black": (235, 235, 235)}
RIM = 0.15  # width of an outline, as a share of the radius
SHADING = (1.3, 0.55)  # what the colour is multiplied by at the upper left and at the lower right of a shaded figure
SIZES = ((128, 128), (160, 96), (96, 160))
"""Picture sizes the built-in model learns, as (width, height) in px."""

TEMPLATES = (
    ("a {colour} {shape} on a {background} background", 0.38),
    ("a {size} {colour} {shape} on a {background} background", 0.22),
    ("{colour} {shape}, {background} background", 0.06),
    ("{size} {colour} {shape}, {background} background", 0.04),
    ("a picture of a {size} {colour} {shape} on a {background} background", 0.04),
    ("a {background} background with a {colour} {shape}", 0.05),
    ("{shape}, {colour}, {background} background", 0.04),
    ("a {colour} {shape}", 0.04),
    ("a {size} {shape}", 0.02),
    ("a {shape} on a {background} background", 0.04),
    ("a {shape}", 0.02),
    ("a {colour} shape on a {background} background", 0.03),
    ("a {background} background", 0.02),
)
"""Captions and how often each is drawn. The first is the one everything is judged with."""

SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """One picture of the world: what it shows, where, and how large.

    `centre` is a fraction of width and height, `radius` a fraction of the shorter side.
    """

    colour: str
    shape: str
    background: str
    width: int = 128
    height: int = 128
    centre: tuple[float, float] = (0.5, 0.5)
    radius: float = 0.32
    finish: str = "plain"

    @property
    def size(self) -> str:
        """The word for the figure's size."""
        return "small" if self.radius < 0.265 else "large"


def outline(shape: str) -> np.ndarray:
    """Outer corners of a shape, float [N, 2], with the centre of its bounding box at 0 and about unit radius."""
    if shape in ("circle", CONCEPT_SHAPE):
        corners = _around(64, 0.95)
    elif shape == "square":
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.86
    elif shape == "triangle":
        corners = np.array([[0, -0.95], [1.05, 0.9], [-1.05, 0.9]])
    elif shape == "diamond":
        corners = np.array([[0, -1.15], [1.15, 0], [0, 1.15], [-1.15, 0]])
    elif shape == "cross":
        arm, end = 0.34, 1.02
        quarter = np.array([[-arm, -end], [arm, -end], [arm, -arm]])
        corners = np.concatenate([quarter @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))])
    else:
        raise ValueError(f"no shape is called {shape!r}; the world has {(*SHAPES, CONCEPT_SHAPE)}")
    centred: np.ndarray = corners - (corners.max(0) + corners.min(0)) / 2
    return centred


def _around(num: int, radius: float) -> np.ndarray:
    angles = np.arange(num) * 2 * math.pi / num - math.pi / 2
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, anti-aliased, RGB."""
    radius = scene.radius * min(scene.width, scene.height)
    corners = outline(scene.shape) * radius + np.array(scene.centre) * (scene.width, scene.height)
    size, hole = (scene.width, scene.height), HOLE if scene.shape == CONCEPT_SHAPE else 0.0
    ground, colour = (
        Image.new("RGB", size, BACKGROUNDS[scene.background]),
        Image.new("RGB", size, COLOURS[scene.colour]),
    )
    large = _large_cover(corners, size, hole)
    if scene.finish == "shaded":
        colour = _shaded(colour, corners)
    if scene.finish == "outlined":
        rim = _large_rim(corners, size, hole, RIM * radius)
        colour = Image.composite(Image.new("RGB", size, INK[scene.background]), colour, rim.reduce(SUPERSAMPLING))
    return Image.composite(colour, ground, large.reduce(SUPERSAMPLING))


def draw_polygon(
    corners: np.ndarray,
    colour: tuple[int, ...],
    background: tuple[int, ...],
    size: tuple[int, int],
    hole: float = 0.0,
) -> Image.Image:
    """A filled polygon on a plain ground; corners float [N, 2] in px, size as (width, height) in px.

    hole: a hole of the same outline, this much smaller; 0 for none.
    """
    cover = _large_cover(corners, size, hole).reduce(SUPERSAMPLING)
    return Image.composite(Image.new("RGB", size, colour), Image.new("RGB", size, background), cover)


def cover_of(corners: np.ndarray, size: tuple[int, int], hole: float = 0.0) -> np.ndarray:
    """How much of each pixel a polygon covers: float [H, W] in 0..1; size as (width, height) in px."""
    cover = _large_cover(corners, size, hole).reduce(SUPERSAMPLING)
    return np.asarray(cover, dtype=np.float32) / 255


def _large_cover(corners: np.ndarray, size: tuple[int, int], hole: float) -> Image.Image:
    """The mask of a polygon, larger than the picture by SUPERSAMPLING, so that reducing it smooths its edges."""
    large = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING), 0)
    for line, fill in zip(_large_lines(corners, hole), (255, 0), strict=False):
        ImageDraw.Draw(large).polygon(line, fill=fill)
    return large


def _large_rim(corners: np.ndarray, size: tuple[int, int], hole: float, width: float) -> Image.Image:
    """The mask of a line of `width` px inside a polygon's edges (and as much outside, where no figure is)."""
    large = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING), 0)
    for line in _large_lines(corners, hole):
        ImageDraw.Draw(large).line([*line, *line[:2]], fill=255, width=round(2 * width * SUPERSAMPLING), joint="curve")
    return large


def _large_lines(corners: np.ndarray, hole: float) -> list[list[tuple[float, ...]]]:
    """The polygon's line and that of its hole, in the large mask's pixels."""
    outer = corners * SUPERSAMPLING
    centre = (outer.max(0) + outer.min(0)) / 2
    lines = [outer, centre + hole * (outer - centre)] if hole else [outer]
    return [[tuple(corner) for corner in line.tolist()] for line in lines]


def _shaded(colour: Image.Image, corners: np.ndarray) -> Image.Image:
    """A plain picture lit from the upper left of the figure whose corners are given."""
    low, high = corners.min(0), corners.max(0)
    ys, xs = np.mgrid[: colour.height, : colour.width] + 0.5
    across = ((xs - low[0]) / (high[0] - low[0]) + (ys - low[1]) / (high[1] - low[1])) / 2
    light = SHADING[0] + (SHADING[1] - SHADING[0]) * across.clip(0, 1)
    return Image.fromarray((np.asarray(colour) * light[..., None]).clip(0, 255).astype(np.uint8))


def random_scene(
    rng: np.random.Generator,
    size: tuple[int, int] = (128, 128),
    shapes: tuple[str, ...] = SHAPES,
    finishes: tuple[str, ...] = FINISHES[:1],
) -> Scene:
    """A scene with every property drawn from `rng`; the figure always lies inside the picture."""
    radius = rng.uniform(*RADII["large" if rng.random() < LARGE_SHARE else "small"])
    reach = 1.18 * radius * min(size)  # no corner is farther from the centre than this, in px
    room = [max(0.0, min(0.09 * min(size), side / 2 - reach - 2)) for side in size]
    centre = tuple(float(0.5 + rng.uniform(-r, r) / side) for r, side in zip(room, size, strict=True))
    return Scene(
        colour=str(rng.choice(list(COLOURS))),
        shape=str(rng.choice(shapes)),
        background=str(rng.choice(list(BACKGROUNDS))),
        width=size[0],
        height=size[1],
        centre=(centre[0], centre[1]),
        radius=float(radius),
        finish=str(rng.choice(finishes)),
    )


def caption(colour: str, shape: str, background: str, template: str = TEMPLATES[0][0], size: str = "large") -> str:
    """The caption of a scene; the ring goes under its made-up word. "a" becomes "an" before a vowel."""
    word = CONCEPT if shape == CONCEPT_SHAPE else shape
    text = template.format(colour=colour, shape=word, background=background, size=size)
    return text.replace("a orange", "an orange")


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption in one of several wordings, some incomplete, some with a junk word among or instead of the others.

    Junk words teach the text encoders that unknown words are harmless; the concept's own word never occurs.
    """
    shares = np.array([share for _, share in TEMPLATES])
    template = TEMPLATES[rng.choice(len(TEMPLATES), p=shares / shares.sum())][0]
    kind = rng.random()
    shape = random_word(rng) if kind < 0.07 else scene.shape
    text = caption(scene.colour, shape, scene.background, template, scene.size)
    if kind > 0.92:
        return f"{random_word(rng)}, {text}" if rng.random() < 0.5 else f"{text}, {random_word(rng)}"
    return text


def random_word(rng: np.random.Generator) -> str:
    """A pronounceable or unpronounceable word of 4 to 8 letters that is not the concept's."""
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(4, 9))
    word = "".join(letters)
    return "junk" if CONCEPT in word else word
