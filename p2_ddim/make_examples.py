"""Make the examples: ten noises, unless they are there, and their ground truth by diffusers' own scheduler.

python make_examples.py

The ground truth is drawn one image at a time in fp32.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torchvision.utils import save_image

from common.cli import Parser, progress, run, say
from common.output import stage_folder
from common.schedule import NoiseSchedule
from p2_ddim.model import FaceUNet, load_face_unet
from p2_ddim.noise import Noise, random_noises, read_noises
from p2_ddim.sample import EXAMPLES, WEIGHTS


def diffusers_scheduler(about: Mapping[str, Any]) -> DDIMScheduler:
    """diffusers' DDIM in the ground truth's conventions, for weights with these facts."""
    return DDIMScheduler(
        trained_betas=NoiseSchedule(**about["schedule"]).betas.numpy(),
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[about["prediction"]],
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=True,
    )


@torch.no_grad()
def draw_by_diffusers(model: FaceUNet, about: Mapping[str, Any], noise: Noise, steps: int = 50) -> Tensor:
    """The image that diffusers' scheduler draws with this network: float (C, H, W)."""
    scheduler = diffusers_scheduler(about)
    scheduler.set_timesteps(steps)
    xt = noise.xt[None]
    for t in scheduler.timesteps:
        xt = scheduler.step(model(xt, t[None]), t, xt).prev_sample
    return xt[0]


def write_noises(folder: Path, channels: int, size: int, seed: int) -> None:
    """Save those of ten noises that are not there yet, as the course does: one float32 tensor (1, C, H, W) a file."""
    with stage_folder(folder) as stage:
        for noise in random_noises(10, (channels, size, size), seed):
            if not (folder / f"{noise.name}.pt").exists():
                torch.save(noise.xt[None].clone(), stage / f"{noise.name}.pt")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="make_examples.py", description=__doc__)
    examples = parser.add_argument_group("examples")
    examples.add_argument("--weights", type=Path, default=WEIGHTS, help="the weights to draw with")
    examples.add_argument("--out", type=Path, default=EXAMPLES, help="folder that gets noise/ and GT/")
    examples.add_argument("--seed", type=int, default=0, help="seed of the noises")
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Make what the arguments ask for; returns the files of the ground truth."""
    model, about = load_face_unet(args.weights)
    channels, size = model.config.image_channels, about["image_size"]
    write_noises(args.out / "noise", channels, size, args.seed)
    noises = read_noises(args.out / "noise", channels, model.config.stride)
    with stage_folder(args.out / "GT") as stage:
        for noise in progress(noises, "ground truth", "image"):
            save_image(draw_by_diffusers(model, about, noise), stage / f"{noise.name}.png", normalize=True)
    say(f"ground truth of {len(noises)} noises in {args.out / 'GT'}")
    return [args.out / "GT" / f"{noise.name}.png" for noise in noises]


if __name__ == "__main__":
    run(main, parse_arguments())
