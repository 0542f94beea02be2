"""Problem 1 timed beside its peers in one run: sampling, utilisation, and a training step.

    python benchmarks/p1.py                # the shipped weights, 100 images
    python benchmarks/p1.py --images 500 --json runs/p1_bench.json

Every figure is a median over `--repeats`; the plain peer is a few of its 1000 steps, scaled, and says so.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import PlainContextUNet, plain_steps
from benchmarks.timing import matrix_product_rate, median_seconds
from common.cli import Parser, add_json_argument, check_json, run, write_json
from common.data import LabelledImages
from common.images import to_uint8
from common.runtime import autocast, seeded_generator
from common.schedule import NoiseSchedule
from common.training import diffusion_loss
from p1_ddpm.digits import DOMAINS, joint_label
from p1_ddpm.model import ContextUNet, ContextUNetConfig
from p1_ddpm.sample import DigitSampler, add_sampling_arguments, make_sampler, sampling_options, wanted_digits
from p1_ddpm.train import DigitBatches

PUBLISHED_STEPS = 1000
QUICK_WIDTHS = (8, 16)  # of a network that takes a processor about as long as ours takes a GPU
DIFFUSERS = {
    "ddpm": lambda: DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "dpm-solver++": lambda: DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    ),
}


def time_plain_peer(images: int, steps: int, repeats: int) -> dict[str, float]:
    """The published way: seconds for `images`, from a few steps of a few images, scaled in both."""
    model = PlainContextUNet().eval()
    few = 8
    labels = torch.arange(few)
    taken = median_seconds(lambda: plain_steps(model, torch.randn(few, 3, 28, 28), labels, 2.0, steps), repeats)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps_timed": steps,
        "images_timed": few,
        "seconds_scaled": taken * PUBLISHED_STEPS / steps * images / few,
    }


def diffusers_images(sampler: DigitSampler, digits: list, options: dict, seed: int) -> Tensor:
    """The same network, noise, guidance and number of steps under diffusers' scheduler."""
    scheduler = DIFFUSERS[options["sampler"]]()
    scheduler.set_timesteps(options["steps"])
    classes = [joint_label(sampler.domains, digit.domain, digit.label) for digit in digits]
    labels = torch.tensor([sampler.model.null_label] * len(digits) + classes)
    xt = sampler.steps(digits, seed, options)["xt"]
    with torch.no_grad():
        for t in scheduler.timesteps:
            double = torch.cat([xt, xt]).contiguous(memory_format=torch.channels_last)
            with autocast(sampler.device, sampler.precision):
                output = sampler.model(double, t.repeat(len(double)), labels).float()
            uncond, cond = output.chunk(2)
            xt = scheduler.step(uncond + options["guidance_scale"] * (cond - uncond), t, xt).prev_sample
    return to_uint8(xt.clamp(-1, 1))


def forward_flops(model: ContextUNet) -> int:
    """Floating-point operations of one forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 28, 28), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


class PngFolder(Dataset):
    """The usual way to read a data set: every image decoded anew each time it is asked for."""

    def __init__(self, folder: Path, labels: Tensor):
        self.paths, self.labels = sorted(folder.glob("*.png")), labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.functional import to_tensor

        return to_tensor(Image.open(self.paths[index]).convert("RGB")) * 2 - 1, self.labels[index]


def time_training_step(config: ContextUNetConfig, batch_size: int, repeats: int) -> dict[str, float]:
    """A step with images preloaded as uint8, beside one whose batch a default DataLoader reads from PNG files.

    Both train the same network in the same precision; what differs is where the images come from.
    """
    images = torch.randint(0, 256, (8 * batch_size, 3, 28, 28), generator=seeded_generator(0), dtype=torch.uint8)
    labels = torch.arange(len(images)) % 10
    schedule = NoiseSchedule("cosine")
    preloaded = DigitBatches(
        {"mnistm": LabelledImages(images, labels, [str(i) for i in range(len(images))])},
        DOMAINS, schedule, batch_size, 0.15, (), 0,
    )  # fmt: skip
    model = ContextUNet(config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batch: dict[str, Tensor], network: nn.Module = model) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = diffusion_loss(network, batch, schedule, "v", 5.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def load_preloaded() -> dict[str, Tensor]:
        return preloaded(0, seeded_generator(0, 1, 0))

    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(Path(folder) / f"{i:05d}.png")
        endless = iter_forever(DataLoader(PngFolder(Path(folder), labels), batch_size, shuffle=True))

        def load_png() -> dict[str, Tensor]:
            x0, classes = next(endless)
            return load_preloaded() | {"x0": x0, "labels": classes}

        rows = {
            "preloaded_step": median_seconds(lambda: step(load_preloaded()), repeats),
            "png_step": median_seconds(lambda: step(load_png()), repeats),
            "preloaded_batch": median_seconds(load_preloaded, repeats),
            "png_batch": median_seconds(lambda: next(endless), repeats),
        }
    return rows | {"step_ratio": rows["png_step"] / rows["preloaded_step"]}


def iter_forever(loader: DataLoader):
    while True:
        yield from loader


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="p1.py", description=__doc__)
    work = parser.add_argument_group("work")
    work.add_argument("--images", type=int, default=100, help="images to draw")
    work.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median is told")
    work.add_argument("--peer-steps", type=int, default=2, help="steps of the plain peer to time")
    work.add_argument("--training-batch", type=int, default=128, help="images a training step")
    add_json_argument(parser)
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> dict:
    """Time everything; prints and returns the figures."""
    check_json(args.json)
    sampler = make_sampler(args)
    digits = wanted_digits(sampler.domains, "2025", None, 50)[: args.images]
    options = sampling_options(args, sampler)

    batches = [digits[start : start + args.batch_size] for start in range(0, len(digits), args.batch_size)]

    def ours(method: str = args.sampler) -> Tensor:
        return torch.cat([sampler.images(batch, args.seed, options | {"sampler": method}) for batch in batches])

    def theirs(method: str) -> Tensor:
        chosen = options | {"sampler": method}
        return torch.cat([diffusers_images(sampler, batch, chosen, args.seed) for batch in batches])

    figures = {"images": len(digits), "steps": args.steps, "guidance_scale": args.guidance_scale}
    figures |= {"precision": sampler.precision, "threads": torch.get_num_threads()}
    figures["ours_seconds"] = median_seconds(ours, args.repeats)
    figures["diffusers_seconds"] = {}
    for method in DIFFUSERS:
        pair = (
            median_seconds(lambda m=method: ours(m), args.repeats),
            median_seconds(lambda m=method: theirs(m), args.repeats),
        )
        figures["diffusers_seconds"][method] = {"ours": pair[0], "diffusers": pair[1], "ratio": pair[1] / pair[0]}
    plain = time_plain_peer(len(digits), args.peer_steps, args.repeats)
    figures["plain_peer"] = plain | {"ratio": plain["seconds_scaled"] / figures["ours_seconds"]}
    passes = 1 if args.guidance_scale == 1 else 2
    flops = forward_flops(sampler.model)
    achieved = flops * passes * args.steps * len(digits) / figures["ours_seconds"]
    ceiling = matrix_product_rate(sampler.precision, sampler.device)
    figures["utilisation"] = {"flops_a_pass": flops, "achieved": achieved, "matrix_product": ceiling}
    figures["utilisation"]["share"] = achieved / ceiling
    config = replace(sampler.model.config, num_labels=20)
    figures["training"] = time_training_step(config, args.training_batch, args.repeats)
    quick = replace(config, widths=QUICK_WIDTHS, blocks=(1, 1), embedding=32)
    figures["training_quick_network"] = time_training_step(quick, args.training_batch, args.repeats)
    print(json.dumps(figures, indent=2))
    write_json(args.json, figures)
    return figures


if __name__ == "__main__":
    run(main, parse_arguments())
