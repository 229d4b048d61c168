"""The picture world of the built-in model: plain coloured shapes, their captions, and a judge of pictures.

The world has colours, shapes and backgrounds; every combination is a scene with a caption such as
"a red circle on a white background". One shape, the ring, is held back under a made-up word, CONCEPT:
the built-in model never sees it, so a fine-tune has something to learn.

The judge measures pixels and has learned nothing. It takes the background from the border, the figure from
the pixels far from that background, and names the figure after the outline that covers it best and its hole.
"""

from __future__ import annotations

import functools
import math
from collections import deque
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
SHAPES = ("circle", "square", "triangle", "diamond")
CONCEPT = "zorbit"
CONCEPT_SHAPE = "ring"
HOLE = 0.5  # radius of the hole in a ring, as a share of the ring's
SIZES = ((128, 128), (160, 96), (96, 160))
"""Picture sizes the built-in model learns, as (width, height) in px."""

TEMPLATES = (
    ("a {colour} {shape} on a {background} background", 0.5),
    ("{colour} {shape}, {background} background", 0.1),
    ("a picture of a {colour} {shape} on a {background} background", 0.06),
    ("a {background} background with a {colour} {shape}", 0.06),
    ("{shape}, {colour}, {background} background", 0.05),
    ("a {colour} {shape}", 0.06),
    ("{colour} {shape}", 0.03),
    ("a {shape} on a {background} background", 0.05),
    ("a {shape}", 0.03),
    ("a {colour} shape on a {background} background", 0.03),
    ("a {background} background", 0.03),
)
"""Captions and how often each is drawn. The first is the one everything is judged with."""

SUPERSAMPLING = 4
MIN_AREA = 0.015  # of the picture: smaller figures are specks, the picture shows nothing
MIN_CONTRAST = 60.0  # RGB distance between figure and background
MAX_COLOUR_DISTANCE = 95.0  # RGB distance to the nearest named colour
MAX_BACKGROUND_DISTANCE = 60.0
MIN_HOLE = 0.08  # of the filled figure: less is a flaw, not a hole
MIN_OVERLAP = 0.7  # intersection over union with the best outline
GRID = 64  # side of the square raster on which outlines are compared


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


@dataclass(frozen=True)
class Verdict:
    """What the judge saw: names of the world, "unclear", or "nothing" where no figure stands out."""

    colour: str
    shape: str
    background: str
    overlap: float = 0.0


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
    else:
        raise ValueError(f"no shape is called {shape!r}; the world has {(*SHAPES, CONCEPT_SHAPE)}")
    return corners - (corners.max(0) + corners.min(0)) / 2


def _around(num: int, radius: float) -> np.ndarray:
    angles = np.arange(num) * 2 * math.pi / num - math.pi / 2
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, anti-aliased, RGB."""
    corners = outline(scene.shape) * scene.radius * min(scene.width, scene.height)
    corners = corners + np.array(scene.centre) * (scene.width, scene.height)
    size, ground = (scene.width, scene.height), BACKGROUNDS[scene.background]
    hole = HOLE if scene.shape == CONCEPT_SHAPE else 0.0
    return draw_polygon(corners, COLOURS[scene.colour], ground, size, hole)


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
    large = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING), 0)
    large_corners = corners * SUPERSAMPLING
    ImageDraw.Draw(large).polygon([tuple(corner) for corner in large_corners.tolist()], fill=255)
    if hole:
        centre = (large_corners.max(0) + large_corners.min(0)) / 2
        inner = centre + hole * (large_corners - centre)
        ImageDraw.Draw(large).polygon([tuple(corner) for corner in inner.tolist()], fill=0)
    cover = large.reduce(SUPERSAMPLING)
    return Image.composite(Image.new("RGB", size, colour), Image.new("RGB", size, background), cover)


def random_scene(
    rng: np.random.Generator,
    size: tuple[int, int] = (128, 128),
    shapes: tuple[str, ...] = SHAPES,
) -> Scene:
    """A scene with every property drawn from `rng`; the figure always lies inside the picture."""
    radius = rng.uniform(0.26, 0.36)
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
    )


def caption(colour: str, shape: str, background: str, template: str = TEMPLATES[0][0]) -> str:
    """The caption of a scene; the ring goes under its made-up word. "a" becomes "an" before a vowel."""
    word = CONCEPT if shape == CONCEPT_SHAPE else shape
    text = template.format(colour=colour, shape=word, background=background)
    return text.replace("a orange", "an orange")


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption in one of several wordings, some incomplete, some with a junk word among or instead of the others.

    Junk words teach the text encoders that unknown words are harmless; the concept's own word never occurs.
    """
    shares = np.array([share for _, share in TEMPLATES])
    template = TEMPLATES[rng.choice(len(TEMPLATES), p=shares / shares.sum())][0]
    kind = rng.random()
    shape = random_word(rng) if kind < 0.07 else scene.shape
    text = caption(scene.colour, shape, scene.background, template)
    if kind > 0.92:
        return f"{random_word(rng)}, {text}" if rng.random() < 0.5 else f"{text}, {random_word(rng)}"
    return text


def random_word(rng: np.random.Generator) -> str:
    """A pronounceable or unpronounceable word of 4 to 8 letters that is not the concept's."""
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(4, 9))
    word = "".join(letters)
    return "junk" if CONCEPT in word else word


def judge(picture: Image.Image) -> Verdict:
    """Names colour, shape and background of a picture by measuring its pixels."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = _ground_colour(pixels)
    background = _nearest(ground, BACKGROUNDS, MAX_BACKGROUND_DISTANCE)
    mask = _figure(pixels, ground)
    if mask is None:
        return Verdict("nothing", "nothing", background)
    inside = _erode(mask)
    core = pixels[inside if inside.sum() >= 20 else mask]
    filled = _without_holes(mask)
    shape, overlap = _best_outline(filled)
    if 1 - mask.sum() / filled.sum() >= MIN_HOLE:
        shape = CONCEPT_SHAPE if shape == "circle" else "unclear"
    return Verdict(_nearest(np.median(core, axis=0), COLOURS, MAX_COLOUR_DISTANCE), shape, background, overlap)


def _ground_colour(pixels: np.ndarray) -> np.ndarray:
    border = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :4].reshape(-1, 3), pixels[:, -4:].reshape(-1, 3)])
    return np.median(border, axis=0)


def _nearest(colour: np.ndarray, named: dict[str, tuple[int, int, int]], limit: float) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in named.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= limit else "unclear"


def _figure(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray | None:
    """Mask bool [H, W] of the largest connected region unlike the background; None where nothing stands out."""
    distance = np.linalg.norm(_smooth(pixels) - ground, axis=2)
    # The figure's own contrast, not a fixed number, sets the cut, so that the outline runs half-way up a blurred edge.
    contrast = np.percentile(distance, 98)
    if contrast < MIN_CONTRAST:
        return None
    bright = distance > 0.7 * contrast
    mask = _largest_region(distance > 0.5 * float(np.median(distance[bright])))
    return mask if mask.mean() >= MIN_AREA else None


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """A 3 x 3 mean over the picture, edges repeated."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[:2]
    return sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9


def _erode(mask: np.ndarray, times: int = 2) -> np.ndarray:
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _largest_region(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected region of a mask."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    best: list[tuple[int, int]] = []
    while left:
        start = left.pop()
        region, queue = [start], deque([start])
        while queue:
            y, x = queue.popleft()
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            region.extend(near)
            queue.extend(near)
        best = max(best, region, key=len)
    largest = np.zeros_like(mask)
    if best:
        largest[tuple(np.array(best).T)] = True
    return largest


def _without_holes(mask: np.ndarray) -> np.ndarray:
    """The figure with everything filled that the picture's border cannot reach."""
    height, width = mask.shape
    open_ = np.pad(~mask, 1, constant_values=True)
    return ~_region_from(open_, (0, 0))[1 : height + 1, 1 : width + 1]


def _region_from(mask: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """The 4-connected region of a mask that holds `start`."""
    reached, queue = np.zeros_like(mask), deque([start])
    reached[start] = True
    while queue:
        y, x = queue.popleft()
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1]
            if inside and mask[near] and not reached[near]:
                reached[near] = True
                queue.append(near)
    return reached


def _best_outline(mask: np.ndarray) -> tuple[str, float]:
    """The shape that covers the figure best once both have the same centre of mass and area, and how well (IoU)."""
    seen = _normalised(mask)
    overlaps = {}
    for shape in SHAPES:
        ideal = _template(shape)
        overlaps[shape] = float(np.minimum(seen, ideal).sum() / np.maximum(seen, ideal).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return (best if overlaps[best] >= MIN_OVERLAP else "unclear"), overlaps[best]


def _normalised(mask: np.ndarray) -> np.ndarray:
    """The figure of a mask bool [H, W], centred on its mass and of fixed area: float [GRID, GRID] in 0..1.

    Mass and area, not the bounding box, because a box hangs on single pixels at the figure's rim.
    """
    ys, xs = np.nonzero(mask)
    reach = 1.3 * math.sqrt(len(xs))
    x, y = xs.mean() + 0.5, ys.mean() + 0.5
    frame = (x - reach, y - reach, x + reach, y + reach)
    figure = Image.fromarray(mask.astype(np.uint8) * 255)
    seen = figure.transform((GRID, GRID), Image.Transform.EXTENT, frame, Image.Resampling.BILINEAR)
    return np.asarray(seen, dtype=np.float32) / 255


@functools.cache
def _template(shape: str) -> np.ndarray:
    """A shape as `_normalised` sees it when it is drawn without flaw."""
    drawn = draw_polygon(outline(shape) * 100 + 160, (255,) * 3, (0,) * 3, (320, 320))
    return _normalised(np.asarray(drawn.convert("L")) > 127)


def known_scenes() -> list[Scene]:
    """Every colour x shape x background the base knows, in the fixed order that also fixes the seeds."""
    return [Scene(colour, shape, background) for shape in SHAPES for background in BACKGROUNDS for colour in COLOURS]


def concept_scenes() -> list[Scene]:
    """The concept in every colour on every background."""
    return [Scene(colour, CONCEPT_SHAPE, background) for background in BACKGROUNDS for colour in COLOURS]


def rates(asked: list[Scene], pictures: list[Image.Image]) -> dict[str, float]:
    """How often the judge sees what was asked for, as fractions, by property."""
    pairs = [(scene, judge(picture)) for scene, picture in zip(asked, pictures, strict=True)]
    found = {
        name: float(np.mean([getattr(scene, name) == getattr(verdict, name) for scene, verdict in pairs]))
        for name in ("colour", "shape", "background")
    }
    return {**found, "num": len(pairs)}


def contact_sheet(asked: list[Scene], pictures: list[Image.Image], columns: int = 6) -> Image.Image:
    """The pictures in rows, each framed in green where the judge saw what was asked for and in red where not."""
    side = max(max(picture.size) for picture in pictures) + 8
    sheet = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side), (200, 200, 200))
    for index, (scene, picture) in enumerate(zip(asked, pictures, strict=True)):
        seen = judge(picture)
        right = (seen.colour, seen.shape, seen.background) == (scene.colour, scene.shape, scene.background)
        x, y = index % columns * side, index // columns * side
        frame = (x, y, x + picture.width + 7, y + picture.height + 7)
        ImageDraw.Draw(sheet).rectangle(frame, outline=(0, 170, 0) if right else (220, 0, 0), width=3)
        sheet.paste(picture, (x + 4, y + 4))
    return sheet
