"""Make what comes with the project: the weights, ten noises, and their ground truth by diffusers' own scheduler.

python make_examples.py --install runs/p2/best.safetensors   # take these weights over, in fp16, and draw from them
python make_examples.py                                      # draw the ground truth anew

Noises that are there already are kept. The ground truth is drawn one image at a time in fp32.
"""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torchvision.utils import save_image

from common.checkpoint import load_model_file, save_tensors, to_half
from common.cli import Parser, check, progress, run, say
from common.output import stage_folder, write_atomically
from common.schedule import NoiseSchedule
from p2_ddim.model import FaceUNet, load_face_unet
from p2_ddim.noise import Noise, random_noises, read_noises
from p2_ddim.sample import EXAMPLES, WEIGHTS

KEPT = ("kind", "config", "schedule", "prediction", "image_size", "step", "training", "validation_loss")


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


def install(checkpoint: Path, weights: Path) -> None:
    """Copy a checkpoint's EMA weights in fp16, with the facts about them, and write SHA256SUMS."""
    state, about = load_model_file(checkpoint, "FaceUNet")
    save_tensors(weights, to_half(state), {name: about[name] for name in KEPT if name in about})
    line = f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  {weights.name}\n"
    write_atomically(weights.parent / "SHA256SUMS", lambda temporary: temporary.write_text(line))


def write_noises(folder: Path, channels: int, size: int, seed: int) -> None:
    """Save those of ten noises that are not there yet, as the course does: one float32 tensor (1, C, H, W) a file."""
    with stage_folder(folder) as stage:
        for noise in random_noises(10, (channels, size, size), seed):
            if not (folder / f"{noise.name}.pt").exists():
                torch.save(noise.xt[None].clone(), stage / f"{noise.name}.pt")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="make_examples.py", description=__doc__)
    weights, examples = parser.add_argument_group("weights"), parser.add_argument_group("examples")
    weights.add_argument("--install", type=Path, metavar="CHECKPOINT", help="copy this checkpoint's weights first")
    weights.add_argument("--weights", type=Path, default=WEIGHTS, help="the weights that come with the project")
    examples.add_argument("--out", type=Path, default=EXAMPLES, help="folder that gets noise/ and GT/")
    examples.add_argument("--seed", type=int, default=0, help="seed of the noises")
    examples.add_argument("--noise-only", type=int, metavar="SIZE", help="only make noises, of this size")
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Make what the arguments ask for; returns the files of the ground truth."""
    if args.noise_only is not None:
        check("noise_only", args.noise_only, args.noise_only > 0, "above 0")
        write_noises(args.out / "noise", 3, args.noise_only, args.seed)
        return []
    if args.install:
        install(args.install, args.weights)
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
