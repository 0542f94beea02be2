"""Train a ControlNet to steer a frozen latent diffusion model with hints.

python fill50k.py runs/fill50k && python train.py --data runs/fill50k           # for the shipped base
python train.py --base sd-v1-4.ckpt --data hw2_data/fill50k/training --dry-run  # tells time and memory of a step

Latents and embedded prompts are kept on disk first, in shards. The loss says little here: it stays flat while the
control appears, and rather suddenly. What moves is measured every --validate-every optimizer steps, and drawn every
--sample-every. Running the same command again resumes where the run stopped, encoding included.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from common.cli import Parser, UserError, run
from common.data import shuffled_indices, stratified_timesteps
from common.runtime import pick_device, pick_precision, seeded_generator
from common.schedule import NoiseSchedule
from common.training import Batch, Trainer, diffusion_loss
from common.training_options import TrainingOptions, add_training_arguments, training_options
from latent_diffusion.base import Base, load_base, quiet
from latent_diffusion.files import cache_folder
from latent_diffusion.pairs import HELD_OUT_EVERY, Pair, locate, read_hints, read_table
from p3_controlnet.cache import Cache, encode_pairs
from p3_controlnet.config import ControlNetConfig
from p3_controlnet.dry_run import one_step
from p3_controlnet.model import ControlNet, check_fit
from p3_controlnet.sample import BASE
from p3_controlnet.unet import ControlledUNet, checkpoint_gradients
from p3_controlnet.watch import Watch

ROOT = Path(__file__).resolve().parent.parent
IN_MEMORY = 2**31  # bytes of hints
WATCHED, VALIDATED = 8, 256  # held-out pairs that are drawn, and whose loss is taken, while training


def hint_reader(pairs: list[Pair], data: Path, size: int) -> Callable[[Tensor], Tensor]:
    """From positions of pairs, int64 (n,), to their hints, uint8 (n, 3, size, size).

    All are kept in memory if `IN_MEMORY` has room for them, else read from their files when they are asked for: those
    of the course's fill50k would fill 39 GB.
    """

    def read(index: Tensor) -> Tensor:
        return read_hints([pairs[k] for k in index.tolist()], data, size)

    if len(pairs) * 3 * size**2 > IN_MEMORY:
        return read
    return read(torch.arange(len(pairs))).__getitem__


class PairBatches:
    """Draws the batches: latents, prompts and hints that belong together; now and then the prompt is left out.

    Args:
        cache: latents and embedded prompts of the pairs.
        hints: from positions of pairs to their hints, as `hint_reader` gives it.
        members: positions of the pairs to draw, int64.
        schedule: where timesteps come from.
        batch_size: pairs a batch.
        drop: probability that a prompt becomes the empty one, so that the hint must say all.
        seed: of the order in which pairs come.
    """

    def __init__(
        self,
        cache: Cache,
        hints: Callable[[Tensor], Tensor],
        members: Tensor,
        schedule: NoiseSchedule,
        batch_size: int,
        drop: float,
        seed: int,
    ):
        self.cache, self.hints, self.members = cache, hints, members
        self.schedule, self.batch_size, self.drop, self.seed = schedule, batch_size, drop, seed

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        count = self.batch_size
        index = self.members[shuffled_indices(len(self.members), self.seed, step * count, count)]
        x0, context = self.cache.take(index, torch.rand(count, generator=generator) < self.drop)
        return {
            "x0": x0,
            "context": context,
            "hint": self.hints(index),
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


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    files = parser.add_argument_group("run")
    files.add_argument("--out", type=Path, default=ROOT / "runs" / "p3", help="folder of the run")
    files.add_argument("--base", type=Path, default=BASE, help="the frozen model: a file or diffusers folder")
    files.add_argument("--cache-dir", type=Path, default=cache_folder(), help="where a .ckpt is kept as safetensors")
    files.add_argument("--init", type=Path, metavar="FOLDER", help="ControlNet to start from (default: base's copy)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, default=ROOT / "runs" / "fill50k", help="folder with prompt.json, source/ and target/"
    )
    data.add_argument(
        "--latents", type=Path, metavar="FOLDER", help="where encoded pairs are kept (default: OUT/cache)"
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
    files.add_argument(
        "--guidance-scale",
        type=float,
        default=2.0,
        help="of pictures drawn meanwhile, and with the finished ControlNet",
    )
    model.add_argument(
        "--gradient-checkpointing", action="store_true", help="a third of the memory for activations, a third slower"
    )
    files.add_argument(
        "--dry-run", action="store_true", help="take one step, tell its time and memory, and write nothing into --out"
    )
    add_training_arguments(
        parser,
        large=True,
        steps=4000,
        batch_size=64,
        lr=4e-4,
        ema=0.998,
        validate_every=200,
        sample_every=200,
        save_every=200,
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
    else:
        factor = 2 ** (len(args.hint_channels) - 1)
        if factor != base.factor:
            raise UserError(
                f"--hint-channels: {len(args.hint_channels)} widths fold {factor} pixels, not {base.factor}"
            )
        controlnet = ControlNet.from_unet(base.unet, args.hint_channels)
    if args.gradient_checkpointing:
        checkpoint_gradients(controlnet)
    return controlnet


def check_hints(pairs: list[Pair], data: Path) -> None:
    """Make sure that no hint is missing, which would end the training when its turn comes.

    Raises:
        UserError: one is; with the table's line.
    """
    for pair in pairs:
        if not (path := locate(pair.source, data, "source")).is_file():
            raise UserError(f"{pair.where}: {path}: no such image; fix the name or add the file")


def encoded(base: Base, pairs: list[Pair], args, size: int, folder: Path | None, options: TrainingOptions) -> Cache:
    """The pairs' latents and contexts; then the base is made ready for training, on its device.

    It is encoded in fp32. On a GPU the frozen weights then take the precision of the training, which computes with no
    more of them anyway; the text encoder, which is not needed any longer, stays in main memory.

    Raises:
        UserError: as `encode_pairs`.
    """
    device = pick_device(options.device)
    for part in (base.vae, base.text_encoder):
        part.to(device)
    cache = encode_pairs(base, pairs, args.data, size, folder)
    base.text_encoder.to("cpu")
    dtype = frozen_dtype(pick_precision(options.precision, device), device)
    with quiet():
        for part in (base.vae, base.unet):
            part.to(device, dtype)
    if args.gradient_checkpointing:
        checkpoint_gradients(base.unet)
    return cache


def frozen_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the frozen weights are kept in while training; a processor's group norm is slow in bf16."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return half.get(precision, torch.float32) if device.type != "cpu" else torch.float32


def main(args) -> Path | Mapping[str, Any]:
    """Train; returns the folder of the finished ControlNet (fp16, averaged), `OUT/controlnet`; or a dry run's figures.

    Every eleventh pair is held out: it is never trained on, only validated on.

    Raises:
        UserError: bad arguments or data, a loss that is not finite, or a full disk.
    """
    options = training_options(args)
    if not 0 <= args.prompt_drop <= 1 or not args.min_snr_gamma >= 0:
        raise UserError(
            f"--prompt-drop {args.prompt_drop} --min-snr-gamma {args.min_snr_gamma}: 0 to 1, and at least 0"
        )
    pairs = read_table(args.data)
    check_hints(pairs, args.data)
    base = load_base(args.base, cache=args.cache_dir)
    size = args.image_size or base.unet.config.sample_size * base.factor
    if size < base.factor or size % base.factor:
        raise UserError(f"--image-size {size}: must be divisible by {base.factor}")
    torch.manual_seed(options.seed)
    controlnet = starting_point(args, base)
    at_once = max(1, options.batch_size // options.accumulate)
    about = {"kind": "ControlNet", "config": asdict(controlnet.config), "prediction": base.prediction}
    about |= {"schedule": asdict(base.schedule), "image_size": size}

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return control_loss(model, base, batch, args.min_snr_gamma)

    def batches(members: Tensor, count: int, drop: float, seed: int) -> PairBatches:
        return PairBatches(cache, hints, members, base.schedule, count, drop, seed)

    if args.dry_run:
        pairs = pairs[:at_once]
        cache = encoded(base, pairs, args, size, None, options)
        hints = hint_reader(pairs, args.data, size)
        own = batches(torch.arange(len(pairs)), options.batch_size, args.prompt_drop, options.seed)
        with tempfile.TemporaryDirectory() as scratch:
            return one_step(Trainer(controlnet, options, Path(scratch), about, own, loss_fn))

    cache = encoded(base, pairs, args, size, args.latents or args.out / "cache", options)
    hints = hint_reader(pairs, args.data, size)
    held = torch.arange(len(pairs)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    train, held_out = (mask.nonzero()[:, 0] for mask in (~held, held))
    watched, validation_batch = (
        batches(held_out, count, 0.0, 0)(0, seeded_generator(0, 3)) for count in (WATCHED, VALIDATED)
    )
    watch = Watch(base, watched, cache.null_context, args.guidance_scale, at_once)

    def validate(averaged: nn.Module) -> Tensor:
        parts = zip(*(tensor.split(at_once) for tensor in validation_batch.values()))
        own = ({name: tensor.to(base.device) for name, tensor in zip(validation_batch, part)} for part in parts)
        return sum(loss_fn(averaged, part) * len(part["t"]) for part in own) / VALIDATED

    notes = {name: str(getattr(args, name)) for name in ("base", "data", "init")}
    notes |= {name: getattr(args, name) for name in ("prompt_drop", "min_snr_gamma")}
    own = batches(train, options.batch_size, args.prompt_drop, options.seed)
    trainer = Trainer(controlnet, options, args.out, about, own, loss_fn, validate, watch.picture, notes, watch.measure)
    averaged = trainer.run()
    folder = args.out / "controlnet"
    if trainer.accelerator.is_main_process:
        averaged.save(folder, trainer.facts() | {"guidance_scale": args.guidance_scale})
    trainer.accelerator.end_training()
    return folder


if __name__ == "__main__":
    run(main, parse_arguments())
