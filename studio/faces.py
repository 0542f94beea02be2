"""Problem 2 in the studio: the faces between two noises, along the sphere and along the straight line."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from common.cli import UserError
from common.images import grid, to_pil, to_uint8
from p2_ddim.figures import plot_lengths
from p2_ddim.interpolate import METHODS, between
from p2_ddim.model import load_face_unet
from p2_ddim.noise import Noise, random_noises
from p2_ddim.sampler import DDIMOptions, FaceSampler
from studio.parts import Kept, Status, number, whole

MOST_STEPS, LAST_NOISE = 200, 99
SIDE = 256  # pixels of a face in the page, at least
SHAPE = (3, 64, 64)  # of the noises while there are no weights to tell


class Lengths(NamedTuple):
    """|x_T| of the noise between two others on either way, and sqrt(D), about which Gaussian noise lies."""

    slerp: float
    lerp: float
    shell: float


class Faces:
    """Draws the faces between two noises.

    Args:
        weights: see `load_face_unet`; they may come later.
        device: where to compute.
        precision: of the network.
    """

    def __init__(self, weights: Path, device: torch.device, precision: str):
        self.weights = weights
        self.read = Kept(lambda path: FaceSampler(*load_face_unet(path), device, precision))

    def missing(self) -> str:
        """What to do about weights that are not there; "" where they are."""
        if self.weights.exists():
            return ""
        return (
            f"There are no face weights at {self.weights} yet, so no faces can be drawn; the lengths of the noises are"
            " computed all the same. Train some with p2_ddim/train.py, or name the course's UNet.pt with"
            " --face-weights."
        )

    def noises(self, first: Any, second: Any) -> list[Noise]:
        """Two noises of seed 0 by their numbers; at 64x64 they are those in `p2_ddim/examples/noise`.

        Raises:
            UserError: a number is out of range, or the weights are broken.
        """
        numbers = [
            whole(name, value, 0, LAST_NOISE) for name, value in (("first noise", first), ("second noise", second))
        ]
        shape = SHAPE
        if self.weights.exists():
            sampler = self.read(self.weights)
            shape = sampler.shape
        noises = random_noises(max(numbers) + 1, shape, seed=0)
        return [noises[k] for k in numbers]

    def middle(self, first: Any, second: Any, alpha: Any) -> dict[str, Noise]:
        """The noise between two others on either way, by the way's name."""
        part = number("alpha", alpha, 0, 1)
        ends = self.noises(first, second)
        return {method: between(*ends, method, [part])[0] for method in METHODS}

    def lengths(self, first: Any, second: Any, alpha: Any) -> Lengths:
        """How long the noises in the middle are.

        Raises:
            UserError: a value out of range.
        """
        noises = self.middle(first, second, alpha)
        lengths = {method: float(noise.xt.norm()) for method, noise in noises.items()}
        return Lengths(**lengths, shell=math.sqrt(noises["slerp"].xt.numel()))

    def plot(self, first: Any, second: Any) -> Image.Image:
        """|x_T| all along both ways, as a picture.

        Raises:
            UserError: a value out of range.
        """
        ends = self.noises(first, second)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lengths.png"
            plot_lengths(path, *ends)
            return Image.open(path).convert("RGB")

    @torch.no_grad()
    def draw(
        self, first: Any, second: Any, alpha: Any, steps: Any
    ) -> Iterator[tuple[Image.Image, Image.Image, Image.Image, Image.Image, Status]]:
        """Draw the first face, those on the sphere and on the line, and the second; yields them in every step.

        Until the last step the faces are what the network predicts by then.

        Raises:
            UserError: a value out of range, or the weights are missing or broken.
        """
        if not self.weights.exists():
            raise UserError(f"{self.weights}: no face weights there; see the note above")
        sampler = self.read(self.weights)
        options = DDIMOptions(steps=whole("steps", steps, 1, MOST_STEPS))
        a, b = self.noises(first, second)
        total, noises = options.steps, [a, *self.middle(first, second, alpha).values(), b]
        for done, step in enumerate(sampler.walk(noises, options), start=1):
            images = to_uint8(step.x0 if done < total else step.xt, options.save_range)
            scale = max(1, SIDE // images.shape[-1])
            pictures = [to_pil(grid(image[None], 1, scale, gap=0)) for image in images]
            yield *pictures, Status(f"step {done} of {total}", done, total)
        yield *pictures, Status("Done.")
