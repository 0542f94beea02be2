"""Scenes of filled circles, the course's sentences about them, and their drawings."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from zlib import crc32

import numpy as np
import torch
from PIL import Image

from common.runtime import seeded_generator
from latent_diffusion.miniature.colours import COLOURS, rgb_to_lab

RADII = {1: (0.10, 0.50), 2: (0.10, 0.30)}  # of the picture's side, by number of circles
WHOLE = 0.5  # share of the scenes whose circles lie within the picture; in the others the border may cut them
MARGIN = 3  # pixels left free around each circle
DRAWN = 512  # hints are drawn with this side at least, as the course's are, and then reduced
LINE_WIDTHS = (2 / DRAWN, 8 / DRAWN)  # of the side
SOFT = 3 / DRAWN  # of the side, over which a soft line fades
ROUGH_WIDTHS = (1 / DRAWN, 12 / DRAWN)
FLAWS = ("broken", "jpeg")  # of a hint: gaps in its lines; the noise of a JPEG file of quality 10 to 49
APART = 0.15  # of the side: two centres are at least so far apart from left to right, which orders their names
SAME_COLOUR = 0.25  # share of two-circle scenes with one colour for both
VISIBLE = 20.0  # least CIE76 difference between colours of a scene


@dataclass(frozen=True)
class Circle:
    """A disc; x and y of its centre and its radius in pixels, where pixel (0, 0) covers the square from 0 to 1."""

    x: float
    y: float
    radius: float
    colour: str


@dataclass(frozen=True)
class Scene:
    """Discs from left to right on a background; colours are names in COLOURS.

    The hint's line has a width, as a share of the side, and soft or hard edges.
    """

    circles: tuple[Circle, ...]
    background: str
    line_width: float = 5 / DRAWN
    soft: bool = True

    @property
    def prompt(self) -> str:
        """The course's sentence, with the colours from left to right; once where all discs have one colour."""
        colours = list(dict.fromkeys(circle.colour for circle in self.circles))
        if len(colours) > 1:
            colours = [circle.colour for circle in self.circles]
        return f"{' and '.join(f'{colour} circle' for colour in colours)} with {self.background} background"


def read_prompt(prompt: str) -> tuple[list[str], str] | None:
    """The discs' colour names from left to right, and the background's, of a prompt that Scene.prompt could write.

    One name may stand for several discs. Any other sentence gives None.
    """
    match = re.fullmatch(r"((?:[a-z ]+ circle and )*[a-z ]+ circle) with ([a-z ]+) background", prompt.strip().lower())
    return match and ([part.removesuffix(" circle") for part in match[1].split(" and ")], match[2])


def held_out(circle_name: str, background_name: str) -> bool:
    """Whether this pair of colours, one in ten, is kept for testing; the same in every run and on every machine."""
    return crc32(f"{circle_name} on {background_name}".encode()) % 10 == 0


@cache
def visible_against(name: str) -> frozenset[str]:
    """The colours that differ visibly from a named one (CIE76)."""
    lab = rgb_to_lab(list(COLOURS.values()))
    distances = np.linalg.norm(lab - rgb_to_lab(COLOURS[name]), axis=1)
    return frozenset(other for other, distance in zip(COLOURS, distances) if distance > VISIBLE)


@cache
def circle_colours(background: str, held: bool) -> tuple[str, ...]:
    """The colours that a disc may have on a background, in the order of COLOURS."""
    return tuple(name for name in COLOURS if name in visible_against(background) and held_out(name, background) == held)


def random_colours(generator: torch.Generator, circles: int, held: bool) -> tuple[list[str], str]:
    """Visibly different colours for one or two discs, and a background."""
    while True:
        background, first, second, same = torch.rand(4, generator=generator).tolist()
        background = list(COLOURS)[int(background * len(COLOURS))]
        choices = circle_colours(background, held)
        if not choices:
            continue
        names = [choices[int(first * len(choices))]]
        if circles == 2 and same < SAME_COLOUR:
            return names * 2, background
        if circles == 2:
            choices = [name for name in choices if name in visible_against(names[0])]
            if not choices:
                continue
            names.append(choices[int(second * len(choices))])
        return names, background


def random_places(
    generator: torch.Generator, circles: int, size: int, whole: bool = True
) -> list[tuple[float, float, float]]:
    """x, y and radius, from left to right, of one or two discs that do not touch: within the picture, if `whole`.

    Else their centres are anywhere in it, and the border may cut them.
    """
    smallest, largest = (part * size for part in RADII[circles])
    if whole:
        largest = min(largest, size / 2 - MARGIN)
    while True:
        places = []
        for x, y, radius in torch.rand(circles, 3, generator=generator, dtype=torch.float64).tolist():
            radius = smallest + radius * (largest - smallest)
            edge = radius + MARGIN if whole else 0
            places.append((edge + x * (size - 2 * edge), edge + y * (size - 2 * edge), radius))
        if circles == 1:
            return places
        (x1, y1, r1), (x2, y2, r2) = places = sorted(places)
        if x2 - x1 >= APART * size and np.hypot(x2 - x1, y2 - y1) >= r1 + r2 + 2 * MARGIN:
            return places


def random_scene(generator: torch.Generator, size: int, circles: int, held_out: bool) -> Scene:
    """A scene of one or two circles for a picture of `size` pixels a side, at least 32; see `held_out` for colours."""
    names, background = random_colours(generator, circles, held_out)
    whole, width, soft = torch.rand(3, generator=generator).tolist()
    places = random_places(generator, circles, size, whole < WHOLE)
    discs = tuple(Circle(*place, name) for place, name in zip(places, names))
    return Scene(discs, background, LINE_WIDTHS[0] + width * (LINE_WIDTHS[1] - LINE_WIDTHS[0]), soft < 0.5)


def distances(circle: Circle, size: int) -> np.ndarray:
    """From the circle's centre to the middle of every pixel: float32 (size, size)."""
    middles = np.arange(size, dtype=np.float32) + 0.5
    return np.sqrt((middles - circle.x) ** 2 + ((middles - circle.y) ** 2)[:, None])


def draw_target(scene: Scene, size: int, colours: Mapping[str, Sequence[int]] = COLOURS) -> np.ndarray:
    """The discs on their background, anti-aliased: uint8 (size, size, 3); `colours` has every name's sRGB, 0 to 255."""
    picture = np.full((size, size, 3), colours[scene.background], dtype=np.float32)
    for circle in scene.circles:
        # The share of a pixel that a straight edge at this distance leaves inside.
        cover = np.clip(circle.radius - distances(circle, size) + 0.5, 0, 1)[..., None]
        picture += cover * (np.float32(colours[circle.colour]) - picture)
    return (picture + 0.5).astype(np.uint8)


def draw_hint(scene: Scene, size: int, flaw: str | None = None, generator: torch.Generator | None = None) -> np.ndarray:
    """The discs' edges as white lines on black: uint8 (size, size, 3); the middle of a line is the edge.

    Drawn with a side of 512 at least and reduced as `read_image` reduces such a file, so that training and grading
    see the same pixels. A flaw is one of FLAWS; the generator says where it is.
    """
    side = max(size, DRAWN)
    fade = SOFT * side if scene.soft else 1e-6
    line = np.zeros((side, side), dtype=np.float32)
    for circle in scene.circles:
        x, y, radius = (value * side / size for value in (circle.x, circle.y, circle.radius))
        large = Circle(x, y, radius, circle.colour)
        from_edge = np.abs(distances(large, side) - radius)
        own = np.clip((scene.line_width * side / 2 - from_edge) / fade + 0.5, 0, 1)
        if flaw == "broken":
            own *= breaks(large, side, generator)
        line = np.maximum(line, own)
    hint = Image.fromarray((255 * line + 0.5).astype(np.uint8))
    if flaw == "jpeg":
        file = io.BytesIO()
        hint.save(file, format="JPEG", quality=10 + int(torch.randint(40, (1,), generator=generator)))
        hint = Image.open(file)
    if side != size:
        hint = hint.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(hint.convert("RGB"))


def roughen(scene: Scene, generator: torch.Generator) -> tuple[Scene, str | None]:
    """A scene with a line of another width, in a fourth of the cases each with one of FLAWS too, or as it was."""
    kind, width = torch.rand(2, generator=generator).tolist()
    if kind < 0.25:
        return scene, None
    thin, wide = ROUGH_WIDTHS
    return replace(scene, line_width=thin + width * (wide - thin)), (*FLAWS, None)[int(4 * kind) - 1]


def breaks(circle: Circle, size: int, generator: torch.Generator) -> np.ndarray:
    """One to four gaps in a circle's line, an eighth of it in all at most: 0 there, else 1; float32 (size, size)."""
    middles = np.arange(size, dtype=np.float32) + 0.5
    angle = np.arctan2((middles - circle.y)[:, None], middles - circle.x)
    kept = np.ones((size, size), dtype=np.float32)
    for start, width in torch.rand(1 + int(torch.randint(4, (1,), generator=generator)), 2, generator=generator):
        kept[(angle - 2 * np.pi * float(start)) % (2 * np.pi) < 2 * np.pi * float(width) / 32] = 0
    return kept


def random_scenes(count: int, size: int, seed: int, circles: Sequence[int], held_out: bool) -> Iterator[Scene]:
    """Scenes whose numbers of circles take turns; scene k depends on seed and k alone, not on the count."""
    for k in range(count):
        yield random_scene(seeded_generator(seed, 5, k), size, circles[k % len(circles)], held_out)
