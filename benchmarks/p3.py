"""Problem 3 timed beside its peers in one run: diffusers' pipeline, and training that encodes everything anew.

    python benchmarks/p3.py                       # the shipped base and ControlNet, the shipped examples
    python benchmarks/p3.py --precision fp32

Both sides draw from the same weights, noise, hints and prompts in the same precision, steps, guidance and batches. A
training step is one of our `train.py`; the peer is the same step on images and prompts instead of cached latents.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from torch import Tensor

from common.cli import Parser, Progress, UserError, add_json_argument, check_json, run, silenced, write_json
from common.images import to_uint8
from common.runtime import PRECISIONS, autocast, pick_device, pick_precision
from latent_diffusion.base import Base, load_base
from latent_diffusion.drawing import DTYPES
from latent_diffusion.pairs import Pair, read_hints, read_pairs
from p3_controlnet.model import ControlNet
from p3_controlnet.sample import BASE, CONTROLNET, EXAMPLES
from p3_controlnet.sampler import HintSampler, SamplingOptions
from p3_controlnet.train import control_loss


def by_diffusers(
    base: Path, controlnet: Path, device: torch.device, dtype: torch.dtype
) -> StableDiffusionControlNetPipeline:
    """diffusers' pipeline of the same weights, with our steps from noise to picture."""
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        base,
        controlnet=ControlNetModel.from_pretrained(controlnet, dtype=dtype),
        dtype=dtype,
        safety_checker=None,
        requires_safety_checker=False,
    ).to(device)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def their_pictures(
    pipeline: StableDiffusionControlNetPipeline,
    prompts: list[str],
    hints: Tensor,
    noise: Tensor,
    options: SamplingOptions,
    batch_size: int,
) -> Tensor:
    """The pictures that the pipeline draws from our noise: uint8 (N, 3, H, W)."""
    drawn = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        output = pipeline(
            prompts[batch],
            image=hints[batch].to(pipeline.device) / 255,
            latents=noise[batch].to(pipeline.dtype),
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            output_type="pt",
        )
        drawn.append(to_uint8(output.images.float() * 2 - 1))
    return torch.cat(drawn)


def training_steps(
    base: Base, controlnet: ControlNet, pairs: list[Pair], images: Tensor, hints: Tensor, precision: str
):
    """Two training steps on the same pairs: from what is cached, and from images and prompts."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(controlnet.parameters(), 1e-5, fused=True)
    prompts = [pair.prompt for pair in pairs]

    def encoded() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"x0": base.encode_images(images / 127.5 - 1), "context": base.encode_prompts(prompts)}

    cached = encoded()
    t = torch.randint(0, base.schedule.T, (len(pairs),), generator=generator)
    eps = torch.randn(cached["x0"].shape, generator=generator)
    fixed = {"hint": hints, "t": t.to(base.device), "eps": eps.to(base.device)}

    def step(condition: dict[str, Tensor]) -> Tensor:
        loss = control_loss(controlnet, base, condition | fixed, gamma=0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def from_cache() -> Tensor:
        with autocast(base.device, precision):
            return step(cached)

    def anew() -> Tensor:
        with autocast(base.device, precision):
            return step(encoded())

    return from_cache, anew


def timed(work: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """Median seconds of a few runs after one to warm up, and the last result."""
    seconds = []
    with Progress(1 + repeats, "timing", "run") as phase:
        for _ in range(1 + repeats):
            with silenced():  # the work's own progress would cost it time
                start = perf_counter()
                result = work()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds.append(perf_counter() - start)
            phase.update()
    return statistics.median(seconds[1:]), result


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="p3.py", description=__doc__)
    models = parser.add_argument_group("models")
    models.add_argument("--base", type=Path, default=BASE, help="diffusers pipeline folder")
    models.add_argument("--controlnet", type=Path, default=CONTROLNET, help="its ControlNet's folder")
    models.add_argument("--examples", type=Path, default=EXAMPLES, help="folder with prompt.json, source/ and target/")
    work = parser.add_argument_group("work")
    work.add_argument("--pictures", type=int, default=16, help="to draw")
    work.add_argument("--steps", type=int, default=20, help="of the reverse process")
    work.add_argument("--guidance-scale", type=float, default=3.0, help="1 = off")
    work.add_argument("--batch-size", type=int, default=8, help="pictures at a time, and pairs a training step")
    work.add_argument("--precision", choices=PRECISIONS, default="auto", help="of both sides")
    work.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    work.add_argument("--repeats", type=int, default=3, help="runs of which the median is told")
    add_json_argument(parser)
    return parser.parse_args(argv)


def main(args) -> dict:
    """Time everything; prints and returns the figures.

    Raises:
        UserError: bad arguments or weights.
    """
    for flag, count in {
        "--pictures": args.pictures,
        "--batch-size": args.batch_size,
        "--repeats": args.repeats,
    }.items():
        if count < 1:
            raise UserError(f"{flag} {count}: must be at least 1")
    check_json(args.json)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    dtype = DTYPES[precision]
    pairs = (read_pairs(args.examples / "prompt.json") * args.pictures)[: args.pictures]
    controlnet, _ = ControlNet.load(args.controlnet)
    options = SamplingOptions(steps=args.steps, guidance_scale=args.guidance_scale)
    sampler = HintSampler(load_base(args.base, device, dtype), [controlnet], options)
    hints = read_hints(pairs, args.examples, sampler.size)
    pipeline = by_diffusers(args.base, args.controlnet, device, dtype)

    def ours() -> Tensor:
        return torch.stack([picture for _, picture in sampler.images(pairs, hints, args.batch_size)])

    our_seconds, our_pictures = timed(ours, args.repeats)
    prompts = [pair.prompt for pair in pairs]
    noise = sampler.steps(pairs, hints)["xt"]
    their_seconds, pictures = timed(
        lambda: their_pictures(pipeline, prompts, hints, noise, options, args.batch_size), args.repeats
    )
    difference = (our_pictures.float() - pictures.float()).abs().mean().item()

    base, few = load_base(args.base, device), pairs[: args.batch_size]
    trained = ControlNet.load(args.controlnet)[0].to(device, memory_format=torch.channels_last).train()
    images = read_hints(few, args.examples, sampler.size, "target").to(device)
    steps = training_steps(base, trained, few, images, hints[: len(few)].to(device), precision)
    cached_seconds, anew_seconds = (timed(step, args.repeats)[0] for step in steps)
    figures = {
        "pictures": f"{len(pairs)} of {sampler.size}x{sampler.size}",
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "batch_size": args.batch_size,
        "sampling_seconds": {"ours": our_seconds, "diffusers": their_seconds},
        "mean_difference_of_255": difference,
        "training_step_seconds": {"cached": cached_seconds, "encoding_anew": anew_seconds},
        "times_faster_than": {
            "diffusers": their_seconds / our_seconds,
            "encoding_anew": anew_seconds / cached_seconds,
        },
    }
    print(json.dumps(figures, indent=2))
    write_json(args.json, figures)
    return figures


if __name__ == "__main__":
    run(main, parse_arguments())
