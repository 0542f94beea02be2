"""Problem 1 in the studio: a digit drawn several times, and the way there."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from common.images import grid, to_pil, to_uint8
from common.sampling import METHODS, reverse_process
from p1_ddpm.sample import Digit, DigitSampler
from studio.parts import Kept, Status, choice, number, whole

MOST_STEPS, MOST_DIGITS, MOST_GUIDANCE = 200, 16, 15
SIDE = 112  # pixels of a digit in the page, at least


class Moment(NamedTuple):
    """A place on the way from noise to image.

    Attributes:
        time: "t = 999" and so on; at last the end.
        xt: where the way is there, as pictures: uint8 (N, 3, H, W).
        x0: the image that the network predicts from it.
    """

    time: str
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
        options = {
            "guidance_scale": number("guidance", guidance_scale, 0, MOST_GUIDANCE),
            "guidance_interval": (0, sampler.schedule.T),
            "sampler": choice("sampler", method, METHODS),
            "steps": whole("steps", steps, 1, MOST_STEPS),
            "eta": 0.0,
        }
        digits = [Digit(domain, label, k + 1) for k in range(whole("images", count, 1, MOST_DIGITS))]
        arguments = sampler.steps(digits, whole("seed", seed, 0, 2**31 - 1), options)
        total, xt, moments = len(arguments["timesteps"]), to_uint8(arguments["xt"]), []
        for step in reverse_process(**arguments):
            moments.append(Moment(f"t = {step.t}", xt, to_uint8(step.x0)))
            xt = to_uint8(step.xt)
            yield moments, Status(f"step {len(moments)} of {total}", len(moments), total)
        moments.append(Moment("the end: the images", xt, xt))
        yield moments, Status("Done. Move the slider to walk the way again.")


def show(moments: Sequence[Moment], position: float) -> tuple[Image, Image, str]:
    """One moment as two pictures, xt and the predicted x0, and its time."""
    moment = moments[min(max(0, int(position)), len(moments) - 1)]
    columns = min(4, len(moment.xt))
    scale = max(1, SIDE // moment.xt.shape[-1])
    xt, x0 = (to_pil(grid(images, columns, scale)) for images in moment[1:])
    return xt, x0, moment.time
