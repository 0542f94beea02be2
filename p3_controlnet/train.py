"""Train a ControlNet to steer a frozen latent diffusion model with hints.

python fill50k.py runs/fill50k && python train.py --data runs/fill50k
python train.py --data hw2_data/fill50k/training --base PIPELINE_FOLDER

The loss says little here: it stays flat while the control appears, and rather suddenly. What moves is measured every
--validate-every optimizer steps, and drawn every --sample-every. Running the same command again resumes where the run
stopped.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

from common.data import shuffled_indices, stratified_timesteps
from common.errors import Parser, UserError, run
from common.images import grid, to_uint8
from common.losses import diffusion_loss
from common.pairs import read_hints
from common.runtime import pick_device, seeded_generator
from common.sampling import ImageNoise, draw, guided
from common.schedule import NoiseSchedule
from common.stable_diffusion.base import Base, load_base
from common.stable_diffusion.single_file import cache_folder
from common.training import Batch, Trainer
from common.training_options import add_training_arguments, training_options
from p3_controlnet.cache import Cache, encode_pairs
from p3_controlnet.model import ControlNet, ControlNetConfig, check_fit
from p3_controlnet.pictures import HELD_OUT_EVERY, read_pictures
from p3_controlnet.regions import circle_regions, deepest, hint_regions, intersection_over_union, region_at
from p3_controlnet.sample import BASE
from p3_controlnet.unet import ControlledUNet

ROOT = Path(__file__).resolve().parent.parent
WATCHED = 8  # held-out pairs that are measured and drawn while training
WATCHED_STEPS = 10


class PairBatches:
    """Draws the batches: latents, prompts and hints that belong together; now and then the prompt is left out.

    Args:
        cache: latents and embedded prompts.
        hints: theirs, uint8 (N, 3, H, W).
        members: positions of the pairs to draw, int64.
        schedule: where timesteps come from.
        batch_size: pairs a batch.
        drop: probability that a prompt becomes the empty one, so that the hint must say all.
        seed: of the order in which pairs come.
    """

    def __init__(
        self,
        cache: Cache,
        hints: Tensor,
        members: Tensor,
        schedule: NoiseSchedule,
        batch_size: int,
        drop: float,
        seed: int,
    ):
        self.cache, self.hints, self.members, self.schedule = cache, hints, members, schedule
        self.batch_size, self.drop, self.seed = batch_size, drop, seed

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        count = self.batch_size
        index = self.members[shuffled_indices(len(self.members), self.seed, step * count, count)]
        x0, context = self.cache.take(index, torch.rand(count, generator=generator) < self.drop)
        return {
            "x0": x0,
            "context": context,
            "hint": self.hints[index],
            "t": stratified_timesteps(count, self.schedule.T, generator),
            "eps": torch.randn(x0.shape, generator=generator),
        }


def control_loss(controlnet: nn.Module, base: Base, batch: Batch, gamma: float) -> Tensor:
    """The loss of the base's prediction with the ControlNet's residuals added (Zhang et al. 2023, equation 10).

    Args:
        controlnet: the one part that is trained.
        base: the frozen model.
        batch: from `PairBatches`, on the base's device.
        gamma: of the min-SNR weighting; 0 for none.
    """
    batch = batch | {"hint": batch["hint"] / 255}
    return diffusion_loss(ControlledUNet(base.unet, [controlnet]), batch, base.schedule, base.prediction, gamma)


class Watch:
    """What moves while the loss stays flat, on a few held-out pairs and always the same noise.

    Args:
        base: the frozen model.
        batch: held-out pairs as `PairBatches` draws them, none without its prompt.
        guidance_scale: to draw with.
    """

    def __init__(self, base: Base, batch: Batch, guidance_scale: float):
        self.base, self.guidance_scale = base, guidance_scale
        self.batch = {name: tensor.to(base.device) for name, tensor in batch.items()}
        self.hint = self.batch["hint"] / 255
        self.targets = to_uint8(base.decode(self.batch["x0"], WATCHED))

    def sensitivity(self, controlnet: nn.Module) -> float:
        """||eps(hint) - eps(other hint)|| / ||eps(hint)|| (root mean squares); the other hint is the next pair's."""
        network, schedule, batch = ControlledUNet(self.base.unet, [controlnet]), self.base.schedule, self.batch
        xt = schedule.add_noise(batch["x0"], batch["eps"], batch["t"])

        def eps(hint: Tensor) -> Tensor:
            output = network(xt, batch["t"], batch["context"], hint)
            return schedule.x0_and_eps(output, xt, batch["t"], self.base.prediction)[1]

        own, other = eps(self.hint), eps(self.hint.roll(1, dims=0))
        return float((own - other).square().mean().sqrt() / own.square().mean().sqrt())

    def images(self, controlnet: nn.Module) -> Tensor:
        """The pairs drawn with few steps: uint8 (N, 3, H, W)."""
        network = ControlledUNet(self.base.unet, [controlnet])
        features, context = network.encode_hint(self.hint), self.batch["context"]
        null = self.base.encode_prompts([""]).expand_as(context)
        condition, without = ({"context": c, "features": features} for c in (context, null))
        xt = ImageNoise([(0, k) for k in range(len(context))]).draw(self.batch["x0"].shape[1:], self.base.device)
        denoise = guided(network, condition, without, self.guidance_scale)
        timesteps = self.base.schedule.timesteps(WATCHED_STEPS)
        latents = draw(denoise, self.base.schedule, xt, timesteps, self.base.prediction, clip_x0=False)
        return to_uint8(self.base.decode(latents, WATCHED))

    def measure(self, controlnet: nn.Module) -> Mapping[str, float]:
        """The sensitivity, and how well the discs that are drawn lie where the hints have them: 0 to 1."""
        overlaps = []
        hints, images = (t.permute(0, 2, 3, 1).cpu().numpy() for t in (self.batch["hint"], self.images(controlnet)))
        for hint, image in zip(hints, images):
            for disc in circle_regions(hint_regions(hint))[0]:
                overlaps.append(intersection_over_union(disc, region_at(image, deepest(disc))))
        return {
            "condition_sensitivity": self.sensitivity(controlnet),
            "hint_iou": float(np.mean(overlaps)) if overlaps else 0.0,
        }

    def picture(self, controlnet: nn.Module) -> Tensor:
        """Rows of hints, of what is drawn and of targets: uint8 (3, height, width)."""
        rows = self.batch["hint"].cpu(), self.images(controlnet), self.targets
        return grid(torch.cat(rows), columns=len(rows[0]))


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "p3", help="folder of the run")
    parser.add_argument("--base", type=Path, default=BASE, help="the frozen model: a file or diffusers folder")
    parser.add_argument("--cache-dir", type=Path, default=cache_folder(), help="where a .ckpt is kept as safetensors")
    parser.add_argument("--init", type=Path, metavar="FOLDER", help="ControlNet to start from (default: base's copy)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, default=ROOT / "runs" / "fill50k", help="folder with prompt.json, source/ and target/"
    )
    data.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: the base's)")
    data.add_argument("--prompt-drop", type=float, default=0.1, help="part of the prompts left out")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--hint-channels", type=int, nargs="+", default=list(ControlNetConfig.conditioning_embedding_out_channels),
        help="widths of the hint encoder; each after the first halves the grid",
    )  # fmt: skip
    model.add_argument(
        "--min-snr-gamma",
        type=float,
        default=0.0,
        help="loss weighting; 0 for none: flat colours are decided where it weighs least",
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=2.0,
        help="of pictures drawn meanwhile, and with the finished ControlNet",
    )
    add_training_arguments(
        parser, steps=4000, batch_size=64, lr=4e-4, ema=0.998, validate_every=200, sample_every=200, save_every=200
    )
    return parser.parse_args(argv)


def starting_point(args, base: Base) -> ControlNet:
    """The ControlNet to train: a copy of the base's encoder, or an earlier one.

    Raises:
        UserError: it does not fit the base.
    """
    if args.init:
        controlnet, _ = ControlNet.load(args.init)
        check_fit(controlnet, base, str(args.init))
        return controlnet
    if (factor := 2 ** (len(args.hint_channels) - 1)) != base.factor:
        raise UserError(f"--hint-channels: {len(args.hint_channels)} widths fold {factor} pixels, not {base.factor}")
    return ControlNet.from_unet(base.unet, args.hint_channels)


def main(args) -> Path:
    """Train; returns the folder of the finished ControlNet (fp16, averaged), `OUT/controlnet`.

    Every eleventh pair is held out: it is never trained on, only validated on.

    Raises:
        UserError: bad arguments or data, a loss that is not finite, or a full disk.
    """
    options = training_options(args)
    if not 0 <= args.prompt_drop <= 1 or not args.min_snr_gamma >= 0:
        raise UserError(
            f"--prompt-drop {args.prompt_drop} --min-snr-gamma {args.min_snr_gamma}: 0 to 1, and at least 0"
        )
    base = load_base(args.base, pick_device(options.device), cache=args.cache_dir)
    size = args.image_size or base.unet.config.sample_size * base.factor
    if size < base.factor or size % base.factor:
        raise UserError(f"--image-size {size}: must be divisible by {base.factor}")
    torch.manual_seed(options.seed)
    controlnet = starting_point(args, base)
    pictures = read_pictures(args.data, size)
    cache = encode_pairs(base, pictures.pairs, pictures.images, args.out / "cache.safetensors")
    hints = read_hints(pictures.pairs, args.data, size)
    held = torch.arange(len(hints)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    train, held_out = (mask.nonzero()[:, 0] for mask in (~held, held))
    batches = PairBatches(cache, hints, train, base.schedule, options.batch_size, args.prompt_drop, options.seed)
    watched, validation_batch = (
        PairBatches(cache, hints, held_out, base.schedule, count, 0.0, seed=0)(0, seeded_generator(0, 3))
        for count in (WATCHED, 256)
    )
    watch = Watch(base, watched, args.guidance_scale)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return control_loss(model, base, batch, args.min_snr_gamma)

    def validate(averaged: nn.Module) -> Tensor:
        return loss_fn(averaged, {name: t.to(base.device) for name, t in validation_batch.items()})

    about = {"kind": "ControlNet", "config": asdict(controlnet.config), "prediction": base.prediction}
    about |= {"schedule": asdict(base.schedule), "image_size": size}
    notes = {name: str(getattr(args, name)) for name in ("base", "data", "init")}
    notes |= {name: getattr(args, name) for name in ("prompt_drop", "min_snr_gamma")}
    trainer = Trainer(
        controlnet, options, args.out, about, batches, loss_fn, validate, watch.picture, notes, watch.measure
    )
    averaged = trainer.run()
    folder = args.out / "controlnet"
    if trainer.accelerator.is_main_process:
        facts = {"step": trainer.step, "training": trainer.notes, "validation_loss": trainer.validation_loss()}
        averaged.save(folder, about | facts | {"guidance_scale": args.guidance_scale})
    trainer.accelerator.end_training()
    return folder


if __name__ == "__main__":
    run(main, parse_arguments())
