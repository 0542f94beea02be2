"""Problem 1 in the studio: a digit drawn several times, and the way there."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from common.images import grid, to_pil, to_uint8
from common.sampling import METHODS
from p1_ddpm.digits import Digit
from p1_ddpm.sample import DigitOptions, DigitSampler
from studio.parts import Kept, Status, choice, number, whole

MOST_STEPS, MOST_DIGITS, MOST_GUIDANCE = 200, 16, 15
SIDE = 112  # pixels of a digit in the page, at least


class Moment(NamedTuple):
    """A place on the way from noise to image.

    Attributes:
        t: the timestep; None at the end.
        xt: where the way is there, as pictures: uint8 (N, 3, H, W).
        x0: the image that the network predicts from it; at the end xt itself.
    """

    t: int | None
    xt: Tensor
    x0: Tensor


class Digits:
    """Draws digits from one weights file.

    Args:
        weights: a finished model or a training state.
        device: where to compute.
        precision: of the network.
    """

    def __init__(self, weights: Path, device: torch.device, precision: str):
        self.weights = weights
        self.read = Kept(lambda path: DigitSampler(path, device, precision))

    def domains(self) -> dict[str, int]:
        """How many classes each domain has.

        Raises:
            UserError: the weights are missing or broken.
        """
        return self.read(self.weights).domains

    @torch.no_grad()
    def draw(
        self, domain: Any, label: Any, count: Any, guidance_scale: Any, method: Any, steps: Any, seed: Any
    ) -> Iterator[tuple[list[Moment], Status]]:
        """Draw images number 1 to `count` of a digit; yields the moments so far, more with every step.

        The images are those that sample.py writes with the same options.

        Raises:
            UserError: a value that cannot be drawn, or the weights are missing or broken.
        """
        sampler = self.read(self.weights)
        domain = choice("domain", domain, list(sampler.domains))
        label = whole("digit", label, 0, sampler.domains[domain] - 1)
        options = DigitOptions(
            guidance_scale=number("guidance", guidance_scale, 0, MOST_GUIDANCE),
            sampler=choice("sampler", method, METHODS),
            steps=whole("steps", steps, 1, min(MOST_STEPS, sampler.schedule.T)),
            seed=whole("seed", seed, 0, 2**31 - 1),
        )
        digits = [Digit(domain, label, k + 1) for k in range(whole("images", count, 1, MOST_DIGITS))]
        total, xt, moments = options.steps, to_uint8(sampler.noise(digits, options)), []
        for step in sampler.walk(digits, options):
            moments.append(Moment(step.t, xt, to_uint8(step.x0)))
            xt = to_uint8(step.xt)
            yield moments, Status(f"step {len(moments)} of {total}", len(moments), total)
        moments.append(Moment(None, xt, xt))
        yield moments, Status("Done. Move the slider to walk the way again.")


def show(moments: Sequence[Moment], position: float | None) -> list[tuple[str, Image]]:
    """The moment nearest to a position (None: the first) as two pictures with their captions: xt and predicted x0."""
    t, *states = moments[min(max(0, int(position or 0)), len(moments) - 1)]
    captions = (f"xt at t = {t}", "the x0 predicted from it") if t is not None else ("the end: images", "the same")
    columns, scale = min(4, len(states[0])), max(1, SIDE // states[0].shape[-1])
    return [(caption, to_pil(grid(images, columns, scale))) for caption, images in zip(captions, states)]
