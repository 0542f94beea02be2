"""Problem 3 in the studio: circles placed by hand, and the picture that a ControlNet makes of them and a prompt."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from common.images import grid, to_pil, to_uint8
from latent_diffusion.drawing import SAMPLERS
from latent_diffusion.miniature import BASE
from latent_diffusion.miniature.colours import COLOURS
from latent_diffusion.miniature.scenes import Circle, Scene, draw_hint, read_prompt
from latent_diffusion.pairs import Pair
from p3_controlnet.sample import default_controlnet, load_sampler
from p3_controlnet.sampler import HintOptions, HintSampler
from studio.parts import Kept, Status, choice, number, whole

MOST_STEPS, MOST_STRENGTH, MOST_GUIDANCE = 100, 2, 15
HINT_SIDE, PICTURE_SIDE = 512, 384  # pixels in the page, at least
Place = tuple[Any, Any, Any]
"""x and y of a circle's centre and its radius, in per cent of the picture's side."""


def checked(places: Sequence[Place]) -> list[tuple[float, float, float]]:
    """The places as numbers.

    Raises:
        UserError: there is none, or a number is out of range.
    """
    result = []
    for k, (x, y, radius) in enumerate(places, start=1):
        centre = number(f"circle {k}: x", x, 0, 100), number(f"circle {k}: y", y, 0, 100)
        result.append((*centre, number(f"circle {k}: radius", radius, 1, 50)))
    return result


def scene(places: Sequence[Place], size: int, colours: Sequence[str] = (), background: str = "white") -> Scene:
    """The circles as they stand from left to right in a picture of `size` pixels; white where no colours are given."""
    colours = colours or ["white"] * len(places)
    circles = [
        Circle(*(value * size / 100 for value in place), colour) for place, colour in zip(checked(places), colours)
    ]
    return Scene(tuple(sorted(circles, key=lambda circle: circle.x)), background)


def hint(places: Sequence[Place]) -> Image.Image:
    """The outlines as the page shows them.

    Raises:
        UserError: a number out of range.
    """
    return Image.fromarray(draw_hint(scene(places, HINT_SIDE), HINT_SIDE))


def sentence(places: Sequence[Place], colours: Sequence[Any], background: Any) -> str:
    """The course's sentence about circles of these colours, which it names from left to right.

    Raises:
        UserError: a name that is no colour's, or a number out of range.
    """
    for name in (*colours, background):
        choice("colour", name, list(COLOURS))
    return scene(places, 100, colours, background).prompt


def moved(places: Sequence[Place], x: float, y: float) -> list[Place]:
    """The places after the circle whose centre is nearest to a point has moved there.

    Raises:
        UserError: a number out of range.
    """
    places = checked(places)
    nearest = min(range(len(places)), key=lambda k: (places[k][0] - x) ** 2 + (places[k][1] - y) ** 2)
    return [(x, y, place[2]) if k == nearest else place for k, place in enumerate(places)]


def remark(prompt: str) -> str:
    """What to expect of a prompt that the miniature has seen nothing like; "" for one of its own kind."""
    parts = read_prompt(prompt)
    if parts is None:
        return "The miniature has only read sentences such as “gold circle with navy background”."
    unknown = [name for name in (*parts[0], parts[1]) if name not in COLOURS]
    return f"The miniature knows no colour called “{unknown[0]}”." if unknown else ""


class Circles:
    """Draws with a ControlNet.

    Args:
        args: arguments of p3_controlnet/sample.py: base, ControlNets, device and precision.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.read = Kept(lambda _, *controlnets: load_sampler(Namespace(**vars(args) | {"controlnet": controlnets})))

    def sampler(self) -> tuple[HintSampler, HintOptions]:
        """The sampler with the weights as they are now, and its own options.

        Raises:
            UserError: the weights are missing, broken, or do not fit one another.
        """
        return self.read(self.args.base, *(self.args.controlnet or [default_controlnet(self.args.base)]))

    @torch.no_grad()
    def draw(
        self,
        places: Sequence[Place],
        prompt: Any,
        strength: Any,
        guidance_scale: Any,
        method: Any,
        steps: Any,
        seed: Any,
    ) -> Iterator[tuple[Image.Image, Status]]:
        """Draw one picture; yields in every step what is predicted by then, at last the picture.

        Raises:
            UserError: a value that cannot be drawn, or the weights are missing or broken.
        """
        places = checked(places)
        prompt = " ".join(str(prompt or "").split())
        options = {
            "control_scale": (number("strength", strength, 0, MOST_STRENGTH),),
            "guidance_scale": number("guidance", guidance_scale, 0, MOST_GUIDANCE),
            "sampler": choice("sampler", method, SAMPLERS),
            "steps": whole("steps", steps, 1, MOST_STEPS),
            "seed": whole("seed", seed, 0, 2**31 - 1),
        }
        sampler, own = self.sampler()
        options = replace(own, **options)
        size = sampler.sides(options)[0]
        outlines = torch.from_numpy(draw_hint(scene(places, size), size)).permute(2, 0, 1)
        items = [(Pair("outlines", "picture.png", prompt, "prompt"), outlines)]
        total, scale = options.steps, max(1, PICTURE_SIDE // size)
        for done, step in enumerate(sampler.walk(items, options), start=1):
            images = to_uint8(sampler.base.decode(step.x0 if done < total else step.xt))
            picture = to_pil(grid(images, 1, scale, gap=0))
            yield picture, Status(f"step {done} of {total}", done, total)
        told = remark(prompt) if self.args.base.resolve() == BASE.resolve() else ""
        yield picture, Status(f"Done. {told}".strip())
