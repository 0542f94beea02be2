"""Train a face U-Net on a folder of images, by default a small one on 64x64 faces.

python train.py --data hw2_data/faces
python train.py --data photos --image-size 128 --widths 128 256 256 --attention 0 0 1

Running the same command again resumes where the run stopped.
"""

import sys
from argparse import BooleanOptionalAction
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from common.checkpoint import half, save_tensors, start_from
from common.cli import Parser, UserError, run
from common.data import (
    HELD_OUT_EVERY,
    LabelledImages,
    read_folder_images,
    shuffled_indices,
    stratified_timesteps,
    to_unit_range,
)
from common.images import grid, to_uint8
from common.runtime import seeded_generator
from common.sampling import ImageNoise, draw
from common.schedule import PREDICTIONS, SCHEDULES, NoiseSchedule
from common.training import Batch, Trainer, diffusion_loss, loss_of
from common.training_options import add_training_arguments, training_options
from p2_ddim.model import FaceUNet, FaceUNetConfig

ROOT = Path(__file__).resolve().parent.parent


class FaceBatches:
    """Draws the batches: an endless walk through the images, half of them mirrored, timesteps stratified.

    Args:
        faces: the images.
        schedule: where timesteps come from.
        batch_size: images a batch.
        flip: whether to mirror.
        seed: of the order in which images come.
    """

    def __init__(self, faces: LabelledImages, schedule: NoiseSchedule, batch_size: int, flip: bool, seed: int):
        self.faces, self.schedule, self.batch_size = faces, schedule, batch_size
        self.flip, self.seed = flip, seed

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        index = shuffled_indices(len(self.faces), self.seed, step * self.batch_size, self.batch_size)
        x0 = to_unit_range(self.faces.images[index])
        if self.flip:
            mirrored = torch.rand(len(x0), generator=generator) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        return {
            "x0": x0,
            "t": stratified_timesteps(len(x0), self.schedule.T, generator),
            "eps": torch.randn(x0.shape, generator=generator),
        }


def sample_grid(model: nn.Module, count: int, size: int, schedule: NoiseSchedule, prediction: str) -> Tensor:
    """Samples from always the same noise, to watch a model learn: uint8 (3, height, width)."""
    noise = ImageNoise([(0, k) for k in range(count)])
    xt = noise.draw((model.config.image_channels, size, size), next(model.parameters()).device)

    def denoise(xt: Tensor, t: int) -> Tensor:
        return model(xt, torch.full((len(xt),), t, device=xt.device))

    return grid(to_uint8(draw(denoise, schedule, xt, schedule.timesteps(25), prediction)), columns=8)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    files = parser.add_argument_group("run")
    files.add_argument("--out", type=Path, default=ROOT / "runs" / "p2", help="folder of the run")
    files.add_argument("--init", type=Path, help="weights to start from; a resumed run has its own")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, default=ROOT / "hw2_data" / "faces", help="folder of images")
    data.add_argument("--image-size", type=int, default=64, help="side to cut and resize the images to")
    data.add_argument("--flip", action=BooleanOptionalAction, default=True, help="mirror half of the images")
    model = parser.add_argument_group("model")
    model.add_argument("--patch-size", type=int, default=2, help="pixel blocks folded into channels")
    model.add_argument("--widths", type=int, nargs="+", default=[64, 128, 192], help="channels by level, finest first")
    model.add_argument("--blocks", type=int, default=1, help="residual blocks a level")
    model.add_argument(
        "--attention", type=int, nargs="+", default=[0, 0, 1], choices=(0, 1), help="levels that attend, finest first"
    )
    model.add_argument(
        "--means", action=BooleanOptionalAction, default=True, help="a linear map of the folded channels' means beside"
    )
    model.add_argument("--dropout", type=float, default=0.0, help="inside residual blocks")
    model.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="noise schedule")
    model.add_argument("--prediction", choices=PREDICTIONS, default="v", help="what the network predicts")
    model.add_argument("--min-snr-gamma", type=float, default=5.0, help="loss weighting; 0 for none")
    add_training_arguments(parser, steps=20_000, batch_size=64, lr=6e-4, decay_fraction=0.5, ema=0.999)
    return parser.parse_args(argv)


def model_config(args) -> FaceUNetConfig:
    """The network that the arguments describe.

    Raises:
        UserError: the sizes do not fit one another or the images.
    """
    try:
        config = FaceUNetConfig(
            patch_size=args.patch_size,
            widths=args.widths,
            blocks=args.blocks,
            attention=[bool(level) for level in args.attention],
            middle_attention=(True,),
            embedding=4 * args.widths[0],
            dropout=args.dropout,
            means=args.means,
        )
    except ValueError as error:
        raise UserError(f"--widths, --attention: {error}") from None
    if args.image_size < config.stride or args.image_size % config.stride:
        raise UserError(f"--image-size {args.image_size}: must be divisible by {config.stride}")
    return config


def main(args) -> Path:
    """Train; returns the path of the finished weights (fp16, averaged), `OUT/model.safetensors`.

    Every tenth image by name is held out: it is never trained on, only validated on.

    Raises:
        UserError: bad arguments or data, a loss that is not finite, or a full disk.
    """
    options = training_options(args)
    if not 0 <= args.dropout < 1 or not args.min_snr_gamma >= 0:
        raise UserError(f"--dropout {args.dropout} --min-snr-gamma {args.min_snr_gamma}: 0 to below 1, and at least 0")
    config, schedule = model_config(args), NoiseSchedule(args.schedule)
    faces = read_folder_images(args.data, args.image_size)
    if len(faces) < HELD_OUT_EVERY:
        raise UserError(f"{args.data}: {len(faces)} images; give at least {HELD_OUT_EVERY}")
    train, held_out = faces.split()
    batches = FaceBatches(train, schedule, options.batch_size, args.flip, options.seed)
    validation_batch = FaceBatches(held_out, schedule, 256, flip=False, seed=0)(0, seeded_generator(0, 3))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return diffusion_loss(model, batch, schedule, args.prediction, args.min_snr_gamma)

    def sample(averaged: nn.Module) -> Tensor:
        return sample_grid(averaged, 32, args.image_size, schedule, args.prediction)

    about = {
        "kind": "FaceUNet",
        "config": asdict(config),
        "schedule": asdict(schedule),
        "prediction": args.prediction,
        "image_size": args.image_size,
    }
    notes = {"flip": args.flip, "min_snr_gamma": args.min_snr_gamma, "init": str(args.init) if args.init else None}
    torch.manual_seed(options.seed)
    model = FaceUNet(config)
    if args.init:
        start_from(model, args.init, about)
    validate = loss_of(validation_batch, loss_fn)
    trainer = Trainer(model, options, args.out, about, batches, loss_fn, validate, sample, notes)
    averaged = trainer.run()
    path = args.out / "model.safetensors"
    if trainer.accelerator.is_main_process:
        save_tensors(path, half(averaged.state_dict()), trainer.facts())
    trainer.accelerator.end_training()
    return path


if __name__ == "__main__":
    run(main, parse_arguments())
