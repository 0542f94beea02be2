"""Problem 2 timed beside its peers in one run: a straightforward fp32 loop, and diffusers around the same network.

    python benchmarks/p2.py                                      # the shipped weights
    python benchmarks/p2.py --course --size 256 --compile        # the course's network at its own size

The straightforward loop draws one image at a time; `--loop-images` says how many of them it draws, and its time is
scaled to all. The course's weights are not public, so `--course` takes random ones beside an exact denoiser.
"""

import json
import resource
import statistics
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import matrix_product_rate
from common.cli import Parser, UserError, add_json_argument, check_json, progress, run, silenced, write_json
from common.images import to_uint8
from common.runtime import PRECISIONS, pick_device, pick_precision
from common.schedule import NoiseSchedule
from p2_ddim.make_examples import diffusers_scheduler
from p2_ddim.model import COURSE, FaceUNet, FaceUNetConfig, load_face_unet
from p2_ddim.noise import Noise, random_noises
from p2_ddim.sample import WEIGHTS, count_or_auto
from p2_ddim.sampler import DDIMOptions, FaceSampler


class StandIn(nn.Module):
    """A random network beside the exact denoiser of Gaussian data with deviation 1/2 (eps prediction, linear betas).

    A random network alone is no denoiser: every step would multiply rounding errors, until two correct samplers differ.

    Args:
        network: a `FaceUNet`; its zeroed layers are drawn anew.
        share: how much of its output is added.
    """

    def __init__(self, network: FaceUNet, share: float = 0.3):
        super().__init__()
        self.network, self.config, self.share = network, network.config, share
        self.alphas_cumprod = NoiseSchedule(**COURSE["schedule"]).alphas_cumprod
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.any():
                module.reset_parameters()

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        a = self.alphas_cumprod.to(xt)[t][:, None, None, None]
        return (1 - a).sqrt() / (a / 4 + 1 - a) * xt + self.share * self.network(xt, t)


def make_network(args) -> tuple[nn.Module, dict]:
    """The network to time, fp32 on the CPU, and its facts; the same whenever it is called."""
    if not args.course:
        return load_face_unet(args.weights)
    torch.manual_seed(0)
    return StandIn(FaceUNet()).eval(), COURSE


@torch.no_grad()
def straightforward(network: nn.Module, about: dict, noise: Noise, steps: int, device: torch.device) -> Tensor:
    """DDIM as it is usually written: fp32, one image, the tensor's usual layout. Returns a uint8 image (3, H, W)."""
    alphas_cumprod = NoiseSchedule(**about["schedule"]).alphas_cumprod.float().tolist()
    timesteps = list(range(1, 1001, 1000 // steps))[:steps][::-1]
    xt = noise.xt[None].to(device)
    for t, following in zip(timesteps, [*timesteps[1:], 0]):
        a, a_next = alphas_cumprod[t], alphas_cumprod[following]
        output = network(xt, torch.tensor([t], device=device))
        if about["prediction"] == "v":
            x0, eps = a**0.5 * xt - (1 - a) ** 0.5 * output, (1 - a) ** 0.5 * xt + a**0.5 * output
        else:
            x0, eps = (xt - (1 - a) ** 0.5 * output) / a**0.5, output
        xt = a_next**0.5 * x0.clamp(-1, 1) + (1 - a_next) ** 0.5 * eps
    return to_uint8(xt, "minmax")[0]


def by_diffusers(sampler: FaceSampler, noises: list[Noise], steps: int, batch_size: int) -> Tensor:
    """diffusers' scheduler around our network as it is, in its precision, layout and batches: uint8 (N, 3, H, W)."""
    drawn = []
    for start in range(0, len(noises), batch_size):
        scheduler = diffusers_scheduler(sampler.about)
        scheduler.set_timesteps(steps)
        xt = torch.stack([noise.xt for noise in noises[start : start + batch_size]]).to(sampler.device)
        for t in scheduler.timesteps:
            xt = scheduler.step(sampler.denoise(xt, int(t)).float(), t, xt).prev_sample
        drawn.append(to_uint8(xt, "minmax"))
    return torch.cat(drawn)


def timed(work) -> tuple[float, Tensor]:
    """Seconds that the work takes, and its result, which must lie on the CPU."""
    with silenced():  # the work's own progress would cost it time
        start = perf_counter()
        result = work()
        return perf_counter() - start, result


def mean_squared_error(a: Tensor, b: Tensor) -> float:
    """On the 0-255 scale."""
    return (a.double() - b.double()).square().mean().item()


def forward_flops(config: FaceUNetConfig, size: int) -> int:
    """Floating-point operations of one forward pass of one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        FaceUNet(config)(torch.empty(1, config.image_channels, size, size), torch.empty(1, dtype=torch.long))
    return counter.get_total_flops()


def peak_memory(device: torch.device) -> int:
    """The most bytes that the process has held: of the GPU's memory, or of the machine's where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="p2.py", description=__doc__)
    network = parser.add_argument_group("network")
    network.add_argument("--weights", type=Path, default=WEIGHTS, help="weights of train.py, or UNet.pt")
    network.add_argument("--course", action="store_true", help="the course's network with stand-in weights instead")
    work = parser.add_argument_group("work")
    work.add_argument("--size", type=int, help="side of the images (default: what the weights were trained on)")
    work.add_argument("--images", type=int, default=10, help="images to draw")
    work.add_argument("--loop-images", type=int, default=1, help="images that the straightforward loop draws")
    work.add_argument("--steps", type=int, default=50, help="steps of the reverse process")
    work.add_argument("--batch-size", type=count_or_auto, default="auto", help="images at a time; auto as sample.py")
    work.add_argument("--precision", choices=PRECISIONS, default="auto", help="of ours and of diffusers' run")
    work.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    work.add_argument("--compile", action="store_true", help="torch.compile the network of both")
    work.add_argument("--repeats", type=int, default=1, help="runs of ours and diffusers', of which the median is told")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> dict:
    """Time everything; prints and returns the figures.

    Raises:
        UserError: bad arguments or weights.
    """
    counts = {"--images": args.images, "--loop-images": args.loop_images, "--repeats": args.repeats}
    for flag, count in counts.items():
        if count < 1:
            raise UserError(f"{flag} {count}: must be at least 1")
    if args.loop_images > args.images:
        raise UserError(f"--loop-images {args.loop_images}: at most the {args.images} that are drawn")
    check_json(args.json)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    network, about = make_network(args)
    config, size = network.config, args.size or about["image_size"]
    if size % config.stride:
        raise UserError(f"--size {size}: must be divisible by {config.stride}")
    noises = random_noises(args.images, (config.image_channels, size, size), seed=0)
    options = DDIMOptions(steps=args.steps)
    options.timesteps(NoiseSchedule(**about["schedule"]))
    network.to(device)
    straightforward(network, about, noises[0], 1, device)  # warm up
    loop_seconds, loop_images = timed(
        lambda: torch.stack(
            [straightforward(network, about, noise, args.steps, device) for noise in noises[: args.loop_images]]
        )
    )
    loop_seconds *= args.images / args.loop_images

    sampler = FaceSampler(network, about, device, precision, args.compile)
    batch_size = args.batch_size or sampler.batch_size(size, size)
    sampler.pictures(noises[:batch_size], DDIMOptions(steps=1), batch_size)  # warm up, and compile
    ours, theirs = [], []
    for _ in progress(range(args.repeats), "timing", "run"):
        ours.append(timed(lambda: sampler.pictures(noises, options, batch_size)))
        theirs.append(timed(lambda: by_diffusers(sampler, noises, args.steps, batch_size)))
    our_seconds, their_seconds = (statistics.median(time for time, _ in runs) for runs in (ours, theirs))
    images = ours[0][1]
    flops = forward_flops(config, size)
    figures = {
        "network": "the course's, stand-in weights" if args.course else str(args.weights),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "images": f"{args.images} of {size}x{size}",
        "steps": args.steps,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "compiled": args.compile,
        "batch_size": batch_size,
        "seconds": {"ours": our_seconds, "straightforward": loop_seconds, "diffusers": their_seconds},
        "times_faster_than": {
            "straightforward": loop_seconds / our_seconds,
            "diffusers": their_seconds / our_seconds,
        },
        "mean_squared_error_to": {
            "straightforward": mean_squared_error(images[: args.loop_images], loop_images),
            "diffusers": mean_squared_error(images, theirs[0][1]),
        },
        "gflops_a_pass": flops / 1e9,
        "gflops_a_second": {
            "ours": flops * args.steps * args.images / our_seconds / 1e9,
            "straightforward": flops * args.steps * args.images / loop_seconds / 1e9,
        }
        | {f"matrix product, {kind}": matrix_product_rate(kind, device) / 1e9 for kind in sorted({precision, "fp32"})},
        "peak_memory_gib": peak_memory(device) / 2**30,
    }
    print(json.dumps(figures, indent=2))
    write_json(args.json, figures)
    return figures


if __name__ == "__main__":
    run(main, parse_arguments())
