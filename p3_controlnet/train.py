"""Train a ControlNet to steer a frozen latent diffusion model with hints.

python fill50k.py runs/fill50k && python train.py --data runs/fill50k           # for the shipped base
python train.py --base sd-v1-4.ckpt --data hw2_data/fill50k/training --dry-run  # time and memory of one step

Latents and embedded prompts are computed once and kept on disk. Do not expect the loss to fall: it stays flat while the
control appears, rather suddenly. Watch `hint_iou` and `condition_sensitivity` in OUT/metrics.jsonl, and the samples in
OUT. Run the same command again to resume where the run stopped, encoding included.
"""

import json
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from torch import Tensor, nn

from common.cli import Parser, UserError, add_options, check, option, options_from, run
from common.data import Batch
from common.runtime import pick_device, pick_precision, seeded_generator
from common.training import Trainer, diffusion_loss
from common.training_options import TrainingOptions, add_training_arguments, training_options
from latent_diffusion.base import Base, load_base
from latent_diffusion.drawing import DTYPES
from latent_diffusion.files import cache_folder
from latent_diffusion.miniature import BASE
from latent_diffusion.pairs import HELD_OUT_EVERY, Pair, locate, read_table
from p3_controlnet.cache import Cache, PairBatches, encode_pairs, hint_reader
from p3_controlnet.model import ControlNet, ControlNetConfig, check_fit
from p3_controlnet.unet import ControlledUNet, checkpoint_gradients
from p3_controlnet.watch import Watch

RUNS = Path(__file__).resolve().parent.parent / "runs"
HINT_CHANNELS = ControlNetConfig.conditioning_embedding_out_channels


@dataclass(frozen=True)
class ControlNetTraining:
    """What a ControlNet is trained on, and how; a field with a help text is a flag."""

    out: Path = option(RUNS / "p3", "folder of the run")
    base: Path = option(BASE, "the frozen model: one file or a diffusers folder")
    cache_dir: Path = option(cache_folder(), "where a .ckpt is kept as safetensors")
    init: Path | None = option(None, "ControlNet to start from (default: a copy of the base's encoder)", type=Path)
    data: Path = option(RUNS / "fill50k", "folder with prompt.json, source/ and target/")
    latents: Path | None = option(None, "folder for latents and embedded prompts (default: OUT/cache)", type=Path)
    image_size: int | None = option(None, "side of the images in pixels (default: the base's)", type=int)
    prompt_drop: float = option(0.1, "share of the prompts that are replaced by the empty one")
    hint_channels: Sequence[int] = option(
        HINT_CHANNELS, "widths of the hint encoder; each one after the first halves the grid", type=int, nargs="+"
    )
    min_snr_gamma: float = option(0.0, "cap of the signal-to-noise ratio in the loss weights; 0 for no weights")
    guidance_scale: float = option(2.0, "guidance scale of the samples, and the finished ControlNet's default")
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory, a third slower", action="store_true"
    )
    dry_run: bool = option(False, "take one step, print its time and memory, and write no run", action="store_true")
    watched: int = 8  # held-out pairs that are drawn
    validated: int = 256  # held-out pairs of the validation loss

    def __post_init__(self):
        check("prompt_drop", self.prompt_drop, 0 <= self.prompt_drop <= 1, "between 0 and 1")
        check("min_snr_gamma", self.min_snr_gamma, self.min_snr_gamma >= 0, "at least 0")


def control_loss(controlnet: nn.Module, base: Base, batch: Batch, gamma: float) -> Tensor:
    """The loss of the base's prediction under control (Zhang et al. 2023, equation 10), with min-SNR weights."""
    batch = batch | {"hint": batch["hint"] / 255}
    return diffusion_loss(ControlledUNet(base.unet, [controlnet]), batch, base.schedule, base.prediction, gamma)


def make_controlnet(config: ControlNetTraining, base: Base) -> ControlNet:
    """The ControlNet to train: a copy of the base's encoder, or an earlier one; a `UserError` if it does not fit."""
    if config.init:
        controlnet, _ = ControlNet.load(config.init)
        check_fit(controlnet, base, config.init)
        return controlnet
    factor = 2 ** (len(config.hint_channels) - 1)
    if factor != base.factor:
        raise UserError(f"--hint-channels: {len(config.hint_channels)} widths fold {factor} pixels, not {base.factor}")
    return ControlNet.from_unet(base.unet, config.hint_channels)


def frozen_dtype(options: TrainingOptions) -> torch.dtype:
    """What the frozen weights are kept in while training; a processor's group norm is slow in bf16."""
    device = pick_device(options.device)
    return torch.float32 if device.type == "cpu" else DTYPES[pick_precision(options.precision, device)]


def encode_and_place(
    base: Base, pairs: list[Pair], data: Path, size: int, folder: Path | None, options: TrainingOptions
) -> Cache:
    """Encode the pairs in fp32, then put the base on its device in the dtype that training wants.

    A `UserError` if a hint is missing, which would end the training when its turn comes; or as `encode_pairs`.
    """
    for pair in pairs:
        if not (path := locate(pair.source, data, "source")).is_file():
            raise UserError(f"{pair.where}: {path}: no such image; fix the name or add the file")
    device = pick_device(options.device)
    base.vae.to(device)
    base.text_encoder.to(device)
    cache = encode_pairs(base, pairs, data, size, folder)
    base.text_encoder.to("cpu")  # training needs it no longer
    base.vae.to(device, frozen_dtype(options))
    base.unet.to(device, frozen_dtype(options))
    return cache


def measure_step(trainer: Trainer) -> dict[str, Any]:
    """Take one optimizer step with the memory that every later one needs; returns and prints its time and memory."""
    device, optimizer = trainer.accelerator.device, trainer.state.optimizer
    parameters = list(trainer.state.trained.values())
    if not trainer.options.offload:
        # Else the first step would make room for the moments only when the activations are gone.
        for parameter in parameters:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=device)} | moments
    trainer.runnable.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = perf_counter()
    loss, _ = trainer.take_step()
    seconds = perf_counter() - started
    if device.type == "cuda":
        peak, what = torch.cuda.max_memory_allocated(device), "allocated on the GPU in the step"
    else:
        peak, what = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident, since the start"
    figures = {
        "batch_size": trainer.options.batch_size,
        "accumulate": trainer.options.accumulate,
        "precision": trainer.accelerator.mixed_precision,
        "parameters_in_the_optimizer": sum(parameter.numel() for parameter in parameters),
        "parameters_of_the_controlnet": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "loss": loss,
        "seconds": round(seconds, 2),
        "peak_memory_gb": round(peak / 1e9, 2),
        "peak_memory": what,
    }
    trainer.accelerator.print(json.dumps(figures, indent=2))
    return figures


def train(
    config: ControlNetTraining,
    options: TrainingOptions,
    make_controlnet: Callable[[ControlNetTraining, Base], ControlNet] = make_controlnet,
) -> Path | Mapping[str, Any]:
    """Train a ControlNet; returns its folder, `OUT/controlnet` (EMA weights in fp16), or the figures of a dry run.

    Every eleventh pair is held out: it is never trained on, only validated on.
    """
    pairs, base = read_table(config.data), load_base(config.base, cache=config.cache_dir)
    size = base.unet.config.sample_size * base.factor if config.image_size is None else config.image_size
    check("image_size", size, size >= base.factor and size % base.factor == 0, f"divisible by {base.factor}")
    options.seed_weights()
    controlnet = make_controlnet(config, base)
    if config.gradient_checkpointing:
        checkpoint_gradients(controlnet)
        checkpoint_gradients(base.unet.up_blocks)  # no gradient flows through the frozen encoder
    at_once = max(1, options.batch_size // options.accumulate)
    if config.dry_run:
        pairs = pairs[:at_once]
    folder = None if config.dry_run else config.latents or config.out / "cache"
    cache = encode_and_place(base, pairs, config.data, size, folder, options)
    hints, everything = hint_reader(pairs, config.data, size), torch.arange(len(pairs))

    def batches(members: Tensor, count: int, drop: float, seed: int) -> PairBatches:
        return PairBatches(cache, hints, members, base.schedule, count, drop, seed)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return control_loss(model, base, batch, config.min_snr_gamma)

    about = {"kind": "ControlNet", "config": asdict(controlnet.config), "prediction": base.prediction}
    about |= {"schedule": asdict(base.schedule), "image_size": size}
    trainer = partial(Trainer, model=controlnet, options=options, about=about, loss_fn=loss_fn)
    if config.dry_run:
        own = batches(everything, options.batch_size, config.prompt_drop, options.seed)
        with tempfile.TemporaryDirectory() as scratch:
            return measure_step(trainer(folder=Path(scratch), make_batch=own))

    held = everything % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    watched, validation_batch = (
        batches(everything[held], count, 0.0, 0)(0, seeded_generator(0, 3))
        for count in (config.watched, config.validated)
    )
    watch = Watch(base, watched, cache.null_context, config.guidance_scale, at_once)

    def validate(averaged: nn.Module) -> Tensor:
        parts = zip(*(tensor.split(at_once) for tensor in validation_batch.values()))
        own = ({name: tensor.to(base.device) for name, tensor in zip(validation_batch, part)} for part in parts)
        return sum(loss_fn(averaged, part) * len(part["t"]) for part in own) / config.validated

    notes = {name: str(getattr(config, name)) for name in ("base", "data", "init")}
    notes |= {name: getattr(config, name) for name in ("prompt_drop", "min_snr_gamma")}
    finished = config.out / "controlnet"
    trainer(
        folder=config.out,
        make_batch=batches(everything[~held], options.batch_size, config.prompt_drop, options.seed),
        validate=validate,
        sample=watch.picture,
        measure=watch.measure,
        notes=notes,
    ).finish(lambda averaged, facts: averaged.save(finished, facts | {"guidance_scale": config.guidance_scale}))
    return finished


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    add_options(parser.add_argument_group("run"), ControlNetTraining)
    defaults = {"steps": 4000, "batch_size": 64, "lr": 4e-4, "ema": 0.998}
    add_training_arguments(parser, **defaults, validate_every=200, sample_every=200, save_every=200)
    return parser.parse_args(argv)


def main(args) -> Path | Mapping[str, Any]:
    """Train as the arguments say; see `train`."""
    return train(options_from(args, ControlNetTraining), training_options(args))


if __name__ == "__main__":
    run(main, parse_arguments())
