"""Train a face U-Net on a folder of images, by default a small one on 64x64 faces.

python train.py --data hw2_data/faces
python train.py --data photos --image-size 128 --widths 128 256 256 --attention 0 0 1

Running the same command again resumes where the run stopped.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from torch import Tensor, nn

from common.checkpoint import start_from
from common.cli import Parser, UserError, add_options, check, option, options_from, run
from common.data import HELD_OUT_EVERY, Batch, read_folder_images, shuffled_indices, stratified_timesteps, to_unit_range
from common.images import grid, to_uint8
from common.runtime import seeded_generator
from common.sampling import Denoiser, ImageNoise, draw
from common.schedule import PREDICTIONS, SCHEDULES, NoiseSchedule
from common.training import Trainer, diffusion_loss, loss_of, save_half
from common.training_options import TrainingOptions, add_training_arguments, training_options
from p2_ddim.model import FaceUNet, FaceUNetConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class FaceTraining:
    """Which network to train on which images; every field is a flag of the same name. A bad value is a `UserError`."""

    out: Path = option(ROOT / "runs" / "p2", "folder of the run")
    init: Path | None = option(None, "weights to start from; a resumed run has its own", type=Path)
    data: Path = option(ROOT / "hw2_data" / "faces", "folder of images")
    image_size: int = option(64, "side to which the images are cropped and resized")
    flip: bool = option(True, "mirror half of the images")
    patch_size: int = option(2, "side of the pixel blocks that are folded into channels")
    widths: tuple[int, ...] = option((64, 128, 192), "channels of each level, finest first", type=int, nargs="+")
    blocks: int = option(1, "residual blocks of each level")
    attention: tuple[int, ...] = option(
        (0, 0, 1), "1 for each level that attends, else 0, finest first", type=int, nargs="+", choices=(0, 1)
    )
    means: bool = option(True, "add a linear map of the folded channels' means to the output")
    dropout: float = option(0.0, "dropout probability inside residual blocks")
    schedule: str = option("cosine", "noise schedule", choices=SCHEDULES)
    prediction: str = option("v", "what the network predicts", choices=PREDICTIONS)
    min_snr_gamma: float = option(5.0, "cap of the signal-to-noise ratio in the loss weights; 0 for no weights")

    def __post_init__(self):
        check("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1")
        check("min_snr_gamma", self.min_snr_gamma, self.min_snr_gamma >= 0, "at least 0")

    def network(self) -> FaceUNetConfig:
        """The network; raises a `UserError` if its sizes do not fit one another or the images."""
        fields = {name: getattr(self, name) for name in ("patch_size", "widths", "blocks", "dropout", "means")}
        fields |= {"attention": map(bool, self.attention), "middle_attention": [True], "embedding": 4 * self.widths[0]}
        try:
            config = FaceUNetConfig(**fields)
        except ValueError as error:
            raise UserError(f"--widths, --attention: {error}") from None
        fits = self.image_size >= config.stride and self.image_size % config.stride == 0
        check("image_size", self.image_size, fits, f"divisible by {config.stride}")
        return config


def draw_batch(images: Tensor, T: int, flip: bool, generator: torch.Generator) -> Batch:
    """x0, timesteps and noise for uint8 images (N, 3, H, W); `flip` mirrors half of them."""
    x0 = to_unit_range(images)
    if flip:
        mirrored = torch.rand(len(x0), generator=generator) < 0.5
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
    t = stratified_timesteps(len(x0), T, generator)
    return {"x0": x0, "t": t, "eps": torch.randn(x0.shape, generator=generator)}


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    add_options(parser.add_argument_group("run, data and model"), FaceTraining)
    add_training_arguments(parser, batch_size=64, lr=6e-4)
    return parser.parse_args(argv)


def train(
    config: FaceTraining, options: TrainingOptions, make_model: Callable[[FaceUNetConfig], nn.Module] = FaceUNet
) -> Path:
    """Train, and return the path of the finished weights (EMA, fp16), `OUT/model.safetensors`.

    Every tenth image by name is held out: it is never trained on, only validated on.
    """
    network, schedule = config.network(), NoiseSchedule(config.schedule)
    faces = read_folder_images(config.data, config.image_size)
    if len(faces) < HELD_OUT_EVERY:
        raise UserError(f"{config.data}: {len(faces)} images; give at least {HELD_OUT_EVERY}")
    trained, held_out = faces.split()
    loss_fn = partial(diffusion_loss, schedule=schedule, prediction=config.prediction, gamma=config.min_snr_gamma)

    def make_batch(step: int, generator: torch.Generator) -> Batch:
        index = shuffled_indices(len(trained), options.seed, step * options.batch_size, options.batch_size)
        return draw_batch(trained.images[index], schedule.T, config.flip, generator)

    def sample(averaged: nn.Module) -> Tensor:
        shape = network.image_channels, config.image_size, config.image_size
        fixed_noise = ImageNoise([(0, k) for k in range(32)])
        xt = fixed_noise.draw(shape, next(averaged.parameters()).device)
        denoise = Denoiser(averaged, schedule, config.prediction)
        return grid(to_uint8(draw(denoise, schedule, xt, schedule.timesteps(25))), columns=8)

    about = {"kind": "FaceUNet", "config": asdict(network), "schedule": asdict(schedule)}
    about |= {"prediction": config.prediction, "image_size": config.image_size}
    options.seed_weights()
    model = make_model(network)
    if config.init:
        start_from(model, config.init, about)
    index = shuffled_indices(len(held_out), seed=0, start=0, length=256)
    validation = draw_batch(held_out.images[index], schedule.T, False, seeded_generator(0, 3))
    trainer = Trainer(
        model=model,
        options=options,
        folder=config.out,
        about=about,
        make_batch=make_batch,
        loss_fn=loss_fn,
        validate=loss_of(validation, loss_fn),
        sample=sample,
        notes={"flip": config.flip, "min_snr_gamma": config.min_snr_gamma, "init": config.init and str(config.init)},
    )
    path = config.out / "model.safetensors"
    trainer.finish(save_half(path))
    return path


def main(args) -> Path:
    """Train as the arguments say; returns the finished weights."""
    return train(options_from(args, FaceTraining), training_options(args))


if __name__ == "__main__":
    run(main, parse_arguments())
