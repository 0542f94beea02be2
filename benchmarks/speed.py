"""Time one problem beside its peers: the plain algorithm, and diffusers with the same weights.

    python benchmarks/speed.py p1
    python benchmarks/speed.py p2 --course --size 256 --precision bf16      # the course's network at its own size
    python benchmarks/speed.py p3 --json runs/p3_speed.json

Times are medians. Ours and the peers take turns, so whatever else the machine does slows them all. A peer that takes
too long does a part of the work, and its time is scaled.
"""

import json
import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers
from common.cli import Parser, Progress, check, run, silence
from common.output import add_json_argument, check_json, write_json
from common.runtime import PRECISIONS, autocast, pick_device, pick_precision
from latent_diffusion.base import load_base
from latent_diffusion.drawing import DTYPES
from latent_diffusion.miniature import BASE
from latent_diffusion.pairs import read_hints, read_pairs
from p1_ddpm.digits import wanted_digits
from p1_ddpm.sample import WEIGHTS as DIGITS
from p1_ddpm.sample import DigitOptions, DigitSampler
from p2_ddim.model import COURSE, FaceUNet, load_face_unet
from p2_ddim.noise import random_noises
from p2_ddim.sample import WEIGHTS as FACES
from p2_ddim.sampler import DDIMOptions, FaceSampler
from p3_controlnet.model import ControlNet
from p3_controlnet.sample import CONTROLNET, EXAMPLES
from p3_controlnet.sampler import HintOptions, HintSampler

Work = Callable[[], Any]
Figures = dict[str, Any]
PLAIN_STEPS, PLAIN_IMAGES = 2, 8  # of 1000 steps and of the digits, that the plain algorithm takes


def time_in_turn(works: Mapping[str, Work], repeats: int, warm_up: bool = True) -> tuple[dict[str, float], Figures]:
    """Median seconds of each work, and what it last returned; they take turns, uncounted in the first if `warm_up`."""
    seconds, results = {name: [] for name in works}, {}
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    with Progress((warm_up + repeats) * len(works), "timing", "run") as phase:
        for k in range(warm_up + repeats):
            for name, work in works.items():
                wait()
                started = perf_counter()
                with silence():  # printing the work's own progress would cost it time
                    results[name] = work()
                wait()
                if k >= warm_up:
                    seconds[name].append(perf_counter() - started)
                phase.update()
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def measure_rate(
    network: Callable[..., Tensor], inputs: Sequence[Tensor], passes: int, seconds: float, args
) -> Figures:
    """What a network, called as network(*inputs) in each pass, computes a second; a matrix product is the ceiling."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), autocast(args.device, args.precision):
        network(*(tensor.to(args.device) for tensor in inputs))
    flops = counter.get_total_flops()
    a, b = torch.randn(2, 2048, 2048).to(args.device, DTYPES[args.precision])
    product = 2 * 2048**3 / time_in_turn({"product": lambda: a @ b}, repeats=9)[0]["product"]
    rate = passes * flops / seconds
    return {"gflop_a_pass": flops / 1e9, "gflops_a_second": rate / 1e9, "share_of_matrix_product": rate / product}


def compare(drawn: Tensor, other: Tensor) -> dict[str, float]:
    """How far images are from as many of ours, on the 0-255 scale: mean absolute and mean squared."""
    apart = drawn[: len(other)].double() - other.double()
    return {"mean": apart.abs().mean().item(), "mean_square": apart.square().mean().item()}


def in_batches(items: Sequence, size: int) -> list[Sequence]:
    """The items, so many at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def measure_digits(args) -> Figures:
    """Problem 1: ours, diffusers' DPM-Solver++ around our network, and 1000 plain steps of a larger network."""
    options = DigitOptions(steps=args.steps, batch_size=args.batch_size)
    sampler = DigitSampler(args.weights, args.device, args.precision)
    digits = wanted_digits(sampler.domains, "2025", None, 50)[: args.images]
    batches = in_batches(digits, args.batch_size)
    works = {
        "ours": lambda: list(sampler.images(digits, options)),
        "diffusers": lambda: [peers.draw_digits(sampler, batch, options) for batch in batches],
        "plain": peers.prepare_plain_digits(PLAIN_IMAGES, PLAIN_STEPS, args.device),
    }
    seconds, _ = time_in_turn(works, args.repeats)
    seconds["plain"] *= 1000 / PLAIN_STEPS * len(digits) / PLAIN_IMAGES
    one = torch.zeros(1, *sampler.shape), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    rate = measure_rate(sampler.model, one, 2 * args.steps * len(digits), seconds["ours"], args)
    return {"seconds": seconds, **rate}


def load_faces(args) -> tuple[nn.Module, Mapping[str, Any]]:
    """The network to time, fp32 on the CPU, and its facts; the same whenever it is called."""
    if not args.course:
        return load_face_unet(args.weights)
    torch.manual_seed(0)
    return peers.StandIn(FaceUNet()).eval(), COURSE


def measure_faces(args) -> Figures:
    """Problem 2: ours, diffusers' DDIM around our network, and a plain fp32 loop that draws one image at a time."""
    sampler = FaceSampler(*load_faces(args), args.device, args.precision, args.compile)
    plain, about = load_faces(args)
    plain.to(args.device)
    size, stride = args.size or sampler.shape[1], sampler.model.config.stride
    check("size", size, size % stride == 0, f"divisible by {stride}")
    check("loop_images", args.loop_images, 1 <= args.loop_images <= args.images, f"1 to {args.images}")
    noises = random_noises(args.images, (sampler.shape[0], size, size), seed=0)
    batch_size = args.batch_size or sampler.pick_batch_size(size, size)
    options, few = DDIMOptions(steps=args.steps, batch_size=str(batch_size)), noises[: args.loop_images]
    batches = in_batches(noises, batch_size)
    works = {
        "ours": lambda: sampler.pictures(noises, options),
        "diffusers": lambda: torch.cat([peers.draw_faces(sampler, batch, options) for batch in batches]),
        "plain": lambda: torch.cat([peers.draw_plainly(plain, about, noise.xt[None], args.steps) for noise in few]),
    }
    sampler.pictures(noises[:batch_size], replace(options, steps=1))  # warms up, and compiles
    peers.draw_plainly(plain, about, noises[0].xt[None], 1)
    seconds, images = time_in_turn(works, args.repeats, warm_up=False)
    seconds["plain"] *= args.images / args.loop_images
    one = torch.zeros(1, sampler.shape[0], size, size), torch.zeros(1, dtype=torch.long)
    return {
        "size": size,
        "batch_size": batch_size,
        "seconds": seconds,
        "difference": {name: compare(images["ours"], images[name]) for name in ("diffusers", "plain")},
        **measure_rate(sampler.model, one, args.steps * args.images, seconds["ours"], args),
    }


def measure_circles(args) -> Figures:
    """Problem 3: ours, and diffusers' ControlNet pipeline."""
    dtype = DTYPES[args.precision]
    controlnet, about = ControlNet.load(args.controlnet)
    sampler = HintSampler(load_base(args.base, args.device, dtype), [controlnet])
    options = HintOptions(steps=args.steps, batch_size=args.batch_size, guidance_scale=about.get("guidance_scale"))
    pairs = (read_pairs(args.examples / "prompt.json") * args.images)[: args.images]
    items = list(zip(pairs, read_hints(pairs, args.examples, sampler.sides(options)[0])))
    batches = in_batches(items, args.batch_size)
    pipeline = peers.load_pipeline(args.base, args.controlnet, args.device, dtype)
    works = {
        "ours": lambda: torch.stack([picture for _, picture in sampler.images(items, options)]),
        "diffusers": lambda: torch.cat([pipeline(batch, sampler.noise(batch, options), options) for batch in batches]),
    }
    seconds, pictures = time_in_turn(works, args.repeats)
    return {"seconds": seconds, "difference": {"diffusers": compare(*pictures.values())}}


def add_problem(kinds: Any, name: str, measure: Callable, images: int, steps: int, batch_size: int | None):
    """Add the subcommand of a problem, with the flags that all have; returns the group of its own flags."""
    parser = kinds.add_parser(name, prog=f"speed.py {name}", description=measure.__doc__, help=measure.__doc__)
    parser.set_defaults(measure=measure)
    add_json_argument(parser)
    work = parser.add_argument_group("work")
    work.add_argument("--images", type=int, default=images, help="images to draw")
    work.add_argument("--steps", type=int, default=steps, help="steps of the reverse process")
    work.add_argument("--batch-size", type=int, default=batch_size, help="images at a time")
    work.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    work.add_argument("--precision", choices=PRECISIONS, default="auto", help="precision of ours and of diffusers")
    work.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, ...")
    return parser.add_argument_group("problem")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="speed.py", description=__doc__)
    kinds = parser.add_subparsers(dest="problem", metavar="PROBLEM", required=True, help="what to time")
    digits = add_problem(kinds, "p1", measure_digits, 100, 10, 128)
    digits.add_argument("--weights", type=Path, default=DIGITS, help="digit weights")
    faces = add_problem(kinds, "p2", measure_faces, 10, 50, None)
    faces.add_argument("--weights", type=Path, default=FACES, help="weights of train.py, or UNet.pt")
    faces.add_argument("--course", action="store_true", help="random weights for the course's network instead")
    faces.add_argument("--size", type=int, help="side of the images (default: what the weights were trained on)")
    faces.add_argument("--compile", action="store_true", help="torch.compile the network of ours and of diffusers")
    faces.add_argument("--loop-images", type=int, default=1, help="images that the plain loop draws")
    circles = add_problem(kinds, "p3", measure_circles, 16, 20, 8)
    circles.add_argument("--base", type=Path, default=BASE, help="diffusers folder of the frozen model")
    circles.add_argument("--controlnet", type=Path, default=CONTROLNET, help="diffusers folder of the ControlNet")
    circles.add_argument("--examples", type=Path, default=EXAMPLES, help="folder with prompt.json and source/")
    return parser.parse_args(argv)


def peak_memory(device: torch.device) -> int:
    """The most bytes that the process has held, of the GPU's memory or else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def main(args) -> Figures:
    """Time everything; prints and returns the figures."""
    for name in ("images", "repeats"):
        check(name, getattr(args, name), getattr(args, name) > 0, "above 0")
    check_json(args.json)
    args.device = pick_device(args.device)
    args.precision = pick_precision(args.precision, args.device)
    figures = {"device": str(args.device), "threads": torch.get_num_threads()}
    figures |= {name: getattr(args, name) for name in ("problem", "images", "steps", "batch_size", "precision")}
    figures |= args.measure(args)
    figures["peak_memory_gib"] = peak_memory(args.device) / 2**30
    figures["times_ours"] = {name: taken / figures["seconds"]["ours"] for name, taken in figures["seconds"].items()}
    print(json.dumps(figures, indent=1))
    write_json(args.json, figures)
    return figures


if __name__ == "__main__":
    run(main, parse_arguments())
