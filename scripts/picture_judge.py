"""Two judges of pictures of the picture world. Both measure pixels and have learned nothing.

`judge` says what it sees: the background from the border, the figure from the pixels far from that background, its name
after the outline that covers it best and its hole. It is forgiving: a wobbly blob is a circle if it is nothing else.
`fit` is strict: it knows which shape was asked for, lays that shape without flaw over the figure, at the best place,
size and angle, and measures how much of both is the same and how far the figure's outline strays.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from picture_world import (
    BACKGROUNDS,
    COLOURS,
    CONCEPT_SHAPE,
    HOLE,
    INK,
    RIM,
    SHAPES,
    Scene,
    cover_of,
    draw_polygon,
    outline,
)
from PIL import Image, ImageDraw

MIN_AREA = 0.015  # of the picture: smaller figures are specks, the picture shows nothing
MIN_CONTRAST = 60.0  # RGB distance between figure and background
MAX_COLOUR_DISTANCE = 95.0  # RGB distance to the nearest named colour
MAX_BACKGROUND_DISTANCE = 60.0
MIN_HOLE = 0.08  # of the filled figure: less is a flaw, not a hole
MIN_OVERLAP = 0.7  # intersection over union with the best outline, for the forgiving judge
STRICT_OVERLAP = 0.85  # and with the shape that was asked for, for the strict one
MAX_STRAY = 0.035  # of the radius: what strays farther is wobbly to the eye
MAX_TILT = math.radians(12)  # what is turned further is another shape: a square by 45 degrees is a diamond
MIN_FALL = 0.2  # of the light across a figure, for it to be shaded
GRID = 64  # side of the square raster on which outlines are compared


@dataclass(frozen=True)
class Verdict:
    """What the judge saw: names of the world, "unclear", or "nothing" where no figure stands out."""

    colour: str
    shape: str
    background: str
    overlap: float = 0.0


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
    ground: np.ndarray = np.median(border, axis=0)
    return ground


def _nearest(colour: np.ndarray, named: dict[str, tuple[int, int, int]], limit: float) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in named.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= limit else "unclear"


def _figure(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray | None:
    """Mask bool [H, W] of the largest connected region unlike the background; None where nothing stands out."""
    distance = np.linalg.norm(_smooth(pixels) - ground, axis=2)
    contrast = _contrast(distance)
    if contrast is None:
        return None
    mask = _largest_region(distance > 0.5 * contrast)
    return mask if mask.mean() >= MIN_AREA else None


def _contrast(distance: np.ndarray) -> float | None:
    """How far the figure's most common colour is from the ground; None where nothing stands out.

    The figure's own contrast, not a fixed number, sets where it is cut out, so that its outline runs half-way up a
    blurred edge. The median, because the ink of an outline may be farther from the ground than all the rest.
    """
    if np.percentile(distance, 98) < MIN_CONTRAST:
        return None
    return float(np.median(distance[distance > 0.7 * MIN_CONTRAST]))


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """A 3 x 3 mean over the picture, edges repeated."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[:2]
    shifted = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.asarray(sum(shifted) / 9)


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


# ---- the strict judge ----


@dataclass(frozen=True)
class Fit:
    """How well a figure is the shape that was asked for.

    overlap: intersection over union with the flawless shape, 0 to 1. stray: how far the figure's outline is from the
    shape's on average, as a share of the radius. A blob may cover 90 % of a circle; its stray tells.
    """

    overlap: float
    stray: float


NO_FIT = Fit(0.0, 1.0)


def fit(picture: Image.Image, shape: str) -> Fit:
    """How well the picture's figure is a flawless `shape` at its best place, size and angle.

    Everything that stands out counts as figure, and a blurred or blotchy pixel counts in part.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    distance = np.linalg.norm(pixels - _ground_colour(pixels), axis=2)
    contrast = _contrast(distance)
    if contrast is None:
        return NO_FIT
    seen = (2 * distance / contrast - 0.5).clip(0, 1)  # half a pixel is half the contrast
    if seen.mean() < MIN_AREA:
        return NO_FIT
    return _best_fit(seen, shape)


def _best_fit(seen: np.ndarray, shape: str) -> Fit:
    """The best fit of a figure, float [H, W] in 0..1: each of the shape's four numbers is tried up and down, in finer
    and finer steps."""
    place = _first_place(seen, shape)
    best = _overlap_at(seen, shape, place)
    steps = np.array([4.0, 4.0, 0.08 * place[2], math.radians(6)])
    for _ in range(5):
        improved = True
        while improved:
            improved = False
            for move in np.concatenate([np.diag(steps), -np.diag(steps)]):
                found = _overlap_at(seen, shape, place + move)
                if found > best + 1e-4:
                    best, place, improved = found, place + move, True
        steps /= 2
    apart = (1 - best) / (1 + best) * (seen.sum() + _ideal(seen, shape, place).sum())  # px that only one of both covers
    return Fit(best, float(apart / (_perimeter(shape) * place[2] ** 2)))


def _first_place(seen: np.ndarray, shape: str) -> np.ndarray:
    """Where to begin: the centre's x and y and the radius, in px, from the figure's mass and area; and no tilt."""
    ideal = cover_of(outline(shape) * 50 + 100, (200, 200), _hole(shape))
    ys, xs = np.mgrid[: seen.shape[0], : seen.shape[1]] + 0.5
    ideal_ys, ideal_xs = np.mgrid[:200, :200] + 0.5
    radius = 50 * math.sqrt(seen.sum() / ideal.sum())
    x = (xs * seen).sum() / seen.sum() - ((ideal_xs * ideal).sum() / ideal.sum() - 100) * radius / 50
    y = (ys * seen).sum() / seen.sum() - ((ideal_ys * ideal).sum() / ideal.sum() - 100) * radius / 50
    return np.array([x, y, radius, 0.0])


def _overlap_at(seen: np.ndarray, shape: str, place: np.ndarray) -> float:
    if abs(place[3]) > MAX_TILT:
        return 0.0
    ideal = _ideal(seen, shape, place)
    return float(np.minimum(seen, ideal).sum() / np.maximum(seen, ideal).sum())


def _ideal(seen: np.ndarray, shape: str, place: np.ndarray) -> np.ndarray:
    """The shape without flaw at a place, float [H, W] in 0..1, as large as the picture."""
    x, y, radius, tilt = place
    turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    return cover_of(outline(shape) * radius @ turn + (x, y), (seen.shape[1], seen.shape[0]), _hole(shape))


@functools.cache
def _perimeter(shape: str) -> float:
    """The length of a shape's outline and of its hole's, for a radius of 1."""
    corners = outline(shape)
    length = np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1).sum()
    return float(length * (1 + _hole(shape)))


def _hole(shape: str) -> float:
    return HOLE if shape == CONCEPT_SHAPE else 0.0


# ---- how a figure is painted ----


def finish(picture: Image.Image) -> str:
    """ "plain", "outlined" or "shaded", by the figure's rim and by how its light falls; "nothing" without a figure."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ground = _ground_colour(pixels)
    mask = _figure(pixels, ground)
    if mask is None:
        return "nothing"
    filled = _without_holes(mask)
    width = 0.5 * RIM * math.sqrt(filled.sum() / math.pi)  # half as wide as the outline would be
    rim = _erode(mask, 2) & ~_erode(mask, 2 + max(1, round(width)))
    core = _erode(mask, max(3, round(3 * width)))
    if core.sum() < 20 or rim.sum() < 20:
        return "plain"
    ink = np.array(INK[_nearest(ground, BACKGROUNDS, math.inf)])
    rim_colour, core_colour = np.median(pixels[rim], axis=0), np.median(pixels[core], axis=0)
    if np.linalg.norm(rim_colour - ink) < 0.6 * np.linalg.norm(core_colour - ink):
        return "outlined"
    return "shaded" if _fall_of_light(pixels, core) > MIN_FALL else "plain"


def _fall_of_light(pixels: np.ndarray, core: np.ndarray) -> float:
    """How much darker a figure is at its lower right than at its upper left, as a share of its mean light."""
    ys, xs = np.nonzero(core)
    light = pixels[core].sum(axis=1)
    across = xs - xs.mean() + ys - ys.mean()
    near, far = across < np.percentile(across, 25), across > np.percentile(across, 75)
    return float((light[near].mean() - light[far].mean()) / light.mean())


# ---- what is asked for, and how often it is seen ----


def known_scenes() -> list[Scene]:
    """Every colour x shape x background the base knows, in the fixed order that also fixes the seeds."""
    return [Scene(colour, shape, background) for shape in SHAPES for background in BACKGROUNDS for colour in COLOURS]


def concept_scenes() -> list[Scene]:
    """The concept in every colour on every background."""
    return [Scene(colour, CONCEPT_SHAPE, background) for background in BACKGROUNDS for colour in COLOURS]


@dataclass(frozen=True)
class Judgement:
    """One picture under both judges."""

    asked: Scene
    seen: Verdict
    fit: Fit

    @property
    def is_covered(self) -> bool:
        """Whether the figure covers the shape that was asked for."""
        return self.fit.overlap >= STRICT_OVERLAP

    @property
    def is_right(self) -> bool:
        """Whether colour and background are right, and the figure is the shape without wobbles."""
        named = (self.asked.colour, self.asked.background) == (self.seen.colour, self.seen.background)
        return named and self.is_covered and self.fit.stray <= MAX_STRAY


def judge_all(asked: list[Scene], pictures: list[Image.Image]) -> list[Judgement]:
    """Both judges on every picture, each with the scene that was asked for."""
    pairs = zip(asked, pictures, strict=True)
    return [Judgement(scene, judge(picture), fit(picture, scene.shape)) for scene, picture in pairs]


def rates(judged: list[Judgement]) -> dict[str, float]:
    """How often the judges see what was asked for, as fractions.

    shape: to the forgiving judge. covered: overlap of at least STRICT_OVERLAP. right: everything, to the strict judge.
    """
    return {
        "colour": float(np.mean([one.seen.colour == one.asked.colour for one in judged])),
        "background": float(np.mean([one.seen.background == one.asked.background for one in judged])),
        "shape": float(np.mean([one.seen.shape == one.asked.shape for one in judged])),
        "covered": float(np.mean([one.is_covered for one in judged])),
        "right": float(np.mean([one.is_right for one in judged])),
        "overlap": float(np.mean([one.fit.overlap for one in judged])),
        "stray": float(np.mean([one.fit.stray for one in judged])),
        "num": len(judged),
    }


def contact_sheet(judged: list[Judgement], pictures: list[Image.Image], columns: int = 6) -> Image.Image:
    """The pictures in rows, each framed in green where everything is right to the strict judge and in red where not."""
    side = max(max(picture.size) for picture in pictures) + 8
    sheet = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side), (200, 200, 200))
    for index, (one, picture) in enumerate(zip(judged, pictures, strict=True)):
        x, y = index % columns * side, index // columns * side
        frame = (x, y, x + picture.width + 7, y + picture.height + 7)
        ImageDraw.Draw(sheet).rectangle(frame, outline=(0, 170, 0) if one.is_right else (220, 0, 0), width=3)
        sheet.paste(picture, (x + 4, y + 4))
    return sheet
