"""Draw pictures that follow hints and prompts: a ControlNet steers a frozen latent diffusion model.

python sample.py prompt.json SOURCE OUT sd-v1-4.ckpt --controlnet PATH     # hints SOURCE/<source> become OUT/<target>
python sample.py prompt.json SOURCE OUT                                    # with the base that comes with the project
python sample.py                                                           # its examples, into outputs/p3
"""

import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import Parser, UserError, run
from common.images import staged, to_pil, to_uint8
from common.pairs import Pair, read_hints, read_pairs, readable_pairs
from common.runtime import PRECISIONS, pick_device, pick_precision
from common.sampling import ImageNoise, guided, reverse_process
from common.stable_diffusion.base import Base, load_base
from common.stable_diffusion.single_file import cache_folder
from p3_controlnet.model import ControlNet, check_fit
from p3_controlnet.patches import in_patches
from p3_controlnet.unet import ControlledUNet, guess_scales

HERE = Path(__file__).resolve().parent
BASE, CONTROLNET = HERE / "weights" / "base", HERE / "weights" / "controlnet"
# A student's own, for the real Stable Diffusion: here, or beside SD_CKPT.
OWN_CONTROLNET = HERE.parent / "checkpoints" / "controlnet_sd.safetensors"
EXAMPLES = HERE / "examples"
OUTPUT = HERE.parent / "outputs" / "p3"
SAMPLERS = ("ddim", "dpm-solver++")
GUIDANCE_SCALE = 7.5  # what Stable Diffusion is usually drawn with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SamplingOptions:
    """How to walk from noise to picture; every field is a flag.

    Args:
        size: side of the pictures, pixels; None for the base's own, which it was trained on.
        steps: steps of the reverse process.
        seed: the same seed gives the same pictures.
        guidance_scale: 1 = off.
        sampler: one of `SAMPLERS`.
        control_scale: strength of the control, one number or one a ControlNet.
        control_scales: further strengths, one a residual: the skips', finest first, then the middle's.
        guess_mode: control the conditional half alone, and less the finer a residual is.
        patch_size: side of the patches in which larger pictures are drawn, pixels; None for the base's own size.
        patch_stride: from one patch to the next, pixels; None for half a patch.

    Raises:
        UserError: a value out of its range.
    """

    size: int | None = None
    steps: int = 20
    seed: int = 0
    guidance_scale: float = GUIDANCE_SCALE
    sampler: str = "ddim"
    control_scale: Sequence[float] = (1.0,)
    control_scales: Sequence[float] | None = None
    guess_mode: bool = False
    patch_size: int | None = None
    patch_stride: int | None = None

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: seeds are whole numbers from 0")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"--guidance-scale {self.guidance_scale}: must be at least 0")
        for flag, numbers in (("scale", self.control_scale), ("scales", self.control_scales or ())):
            if odd := [number for number in numbers if not math.isfinite(number)]:
                raise UserError(f"--control-{flag} {odd[0]}: must be a number such as 0.8")

    def strengths(self, counts: Sequence[int]) -> list[list[float]]:
        """What each ControlNet's residuals are multiplied by.

        Args:
            counts: how many residuals each ControlNet has.

        Raises:
            UserError: there are more or fewer numbers than ControlNets or residuals.
        """
        each = list(self.control_scale) * (len(counts) if len(self.control_scale) == 1 else 1)
        if len(each) != len(counts):
            raise UserError(
                f"--control-scale: {len(each)} numbers for {len(counts)} ControlNets; give one, or one each"
            )
        result = []
        for strength, count in zip(each, counts):
            finer = [1.0] * count if self.control_scales is None else self.control_scales
            if len(finer) != count:
                raise UserError(f"--control-scales: {len(finer)} numbers; this ControlNet has {count} residuals")
            guesses = guess_scales(count) if self.guess_mode else [1.0] * count
            result.append([strength * own * guess for own, guess in zip(finer, guesses)])
        return result


class HintSampler:
    """Draws pictures that follow hints.

    Args:
        base: the frozen model, on its device and in its precision.
        controlnets: one or several that fit it; moved to the same place.
        options: how to draw.

    Raises:
        UserError: an option does not fit the base or the ControlNets.
    """

    def __init__(self, base: Base, controlnets: Sequence[ControlNet], options: SamplingOptions):
        self.base, self.options = base, options
        trained = base.unet.config.sample_size * base.factor
        self.size, patch = (trained if side is None else side for side in (options.size, options.patch_size))
        stride = options.patch_stride
        if stride is None:
            stride = max(base.factor, patch // 2 // base.factor * base.factor)
        for flag, pixels in (("size", self.size), ("patch-size", patch), ("patch-stride", stride)):
            if pixels < base.factor or pixels % base.factor:
                raise UserError(f"--{flag} {pixels}: must be divisible by {base.factor}")
        if stride > patch:
            raise UserError(f"--patch-stride {stride}: must be at most --patch-size, {patch}")
        try:
            self.timesteps = base.schedule.timesteps(options.steps, "trailing")
        except ValueError as error:
            raise UserError(f"--steps {options.steps}: {error}") from None
        # Tensor cores want channels_last; a processor's group norm in bf16 is several times slower with it.
        halved = base.device.type == "cuda" and base.unet.dtype != torch.float32
        layout = torch.channels_last if halved else torch.contiguous_format
        base.unet.to(memory_format=layout)
        for controlnet in controlnets:
            controlnet.to(base.device, base.unet.dtype, memory_format=layout)
        scales = options.strengths([controlnet.residual_count for controlnet in controlnets])
        self.unet = ControlledUNet(base.unet, controlnets, scales)
        self.network = self.unet
        if self.size > patch:
            self.network = in_patches(self.unet, patch // base.factor, stride // base.factor, cut=("features",))

    def conditions(self, pairs: Sequence[Pair], hints: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the network is told of each picture, with its prompt and without; it stays the same in every step."""
        null, *contexts = self.base.encode_prompts(
            ["", *(pair.prompt for pair in pairs)], ["", *(pair.where for pair in pairs)]
        )
        features = self.unet.encode_hint(hints.to(self.base.device) / 255)
        condition = {"context": torch.stack(contexts), "features": features}
        without = {"context": null.expand(len(pairs), -1, -1), "features": features}
        if self.options.guess_mode:
            rows = torch.ones(len(pairs), dtype=torch.bool, device=self.base.device)
            condition["controlled"], without["controlled"] = rows, ~rows
        return condition, without

    def steps(self, pairs: Sequence[Pair], hints: Tensor) -> dict[str, Any]:
        """The arguments of `reverse_process` for these pictures.

        Noise is keyed by the seed and the picture's file name: it does not depend on what else is drawn.

        Args:
            pairs: what to draw.
            hints: theirs, uint8 (N, 3, size, size).
        """
        names = [PurePath(pair.target).as_posix() for pair in pairs]
        noise = ImageNoise([(self.options.seed, zlib.crc32(name.encode())) for name in names])
        side = self.size // self.base.factor
        return {
            "denoise": guided(self.network, *self.conditions(pairs, hints), self.options.guidance_scale),
            "schedule": self.base.schedule,
            "xt": noise.draw((self.base.unet.config.in_channels, side, side), self.base.device),
            "timesteps": self.timesteps,
            "prediction": self.base.prediction,
            "method": self.options.sampler,
            "clip_x0": False,  # latents have no bounds
        }

    @torch.no_grad()
    def images(self, pairs: Sequence[Pair], hints: Tensor, batch_size: int) -> Iterator[tuple[Pair, Tensor]]:
        """Draw the pairs in batches; yields each with its picture, uint8 (3, size, size) on the CPU, in their order.

        Args:
            pairs: what to draw.
            hints: theirs, uint8 (N, 3, size, size).
            batch_size: pictures at a time.

        Raises:
            UserError: a batch does not fit the GPU's memory.
        """
        with tqdm(total=len(pairs) * len(self.timesteps), desc="pictures", unit="step", disable=None) as bar:
            for start in range(0, len(pairs), batch_size):
                batch = pairs[start : start + batch_size]
                try:
                    for step in reverse_process(**self.steps(batch, hints[start : start + batch_size])):
                        latents = step.xt
                        bar.update(len(batch))
                    pictures = to_uint8(self.base.decode(latents, batch_size))
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"{len(batch)} pictures of {self.size}x{self.size} do not fit the GPU's memory; choose a"
                        " smaller --batch-size"
                    ) from None
                yield from zip(batch, pictures)


def add_sampling_arguments(parser: Parser) -> None:
    """The arguments of everything that draws with a ControlNet; see `sampler_from`."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--controlnet",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="one or several, summed; folders or files (default: the shipped one, or with another base"
        f" {'/'.join(OWN_CONTROLNET.parts[-2:])})",
    )
    group.add_argument("--size", type=int, metavar="PIXELS", help="side of the pictures (default: the base's)")
    group.add_argument("--steps", type=int, default=20, help="steps of the reverse process")
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures")
    group.add_argument(
        "--guidance-scale", type=float, help=f"1 = off (default: the ControlNet's own, else {GUIDANCE_SCALE})"
    )
    group.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="reverse process")
    group.add_argument(
        "--control-scale", type=float, nargs="+", default=[1.0], metavar="S", help="strength: one, or one a ControlNet"
    )
    group.add_argument(
        "--control-scales", type=float, nargs="+", metavar="S", help="strengths of the skips, finest first, and middle"
    )
    group.add_argument("--guess-mode", action="store_true", help="let the hint speak without the prompt's help")
    group.add_argument(
        "--patch-size",
        type=int,
        metavar="PIXELS",
        help="larger pictures are drawn in patches (default: the base's size)",
    )
    group.add_argument("--patch-stride", type=int, metavar="PIXELS", help="between patches (default: half a patch)")
    group.add_argument("--batch-size", type=int, default=8, help="pictures at a time; bounds the memory")
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the networks")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--cache-dir", type=Path, default=cache_folder(), help="where a .ckpt is kept as safetensors")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="sample.py", description=__doc__)
    parser.add_argument(
        "table", type=Path, nargs="?", default=EXAMPLES / "prompt.json", metavar="JSON",
        help="a line of JSON a picture: source, target and prompt",
    )  # fmt: skip
    parser.add_argument("source", type=Path, nargs="?", default=EXAMPLES, metavar="SOURCE", help="folder of the hints")
    parser.add_argument("out", type=Path, nargs="?", default=OUTPUT, metavar="OUT", help="folder for the pictures")
    parser.add_argument(
        "base", type=Path, nargs="?", default=BASE, metavar="SD_CKPT",
        help="the frozen model: Stable Diffusion v1 as one file or as a diffusers folder",
    )  # fmt: skip
    parser.add_argument("--keep-going", action="store_true", help="leave out lines that cannot be drawn")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def default_controlnet(base: Path) -> Path:
    """The shipped ControlNet for the shipped base, a student's own for any other.

    Raises:
        UserError: there is none for this base.
    """
    if base.resolve() == BASE.resolve():
        return CONTROLNET
    places = OWN_CONTROLNET, base.parent / OWN_CONTROLNET.name
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"no ControlNet for {base}: put its weights at {places[0]}, or name them with --controlnet; to train one:"
        f" python p3_controlnet/train.py --base {base} --data hw2_data/fill50k/training"
    )


def sampler_from(args) -> HintSampler:
    """The sampler that the arguments describe.

    Raises:
        UserError: a value out of range, or weights that are missing, broken, or do not fit one another.
    """
    chosen = {field.name: getattr(args, field.name) for field in fields(SamplingOptions)}
    own_scale = chosen["guidance_scale"] is None
    options = SamplingOptions(**chosen | ({"guidance_scale": GUIDANCE_SCALE} if own_scale else {}))
    paths = args.controlnet or [default_controlnet(args.base)]
    device = pick_device(args.device)
    base = load_base(args.base, device, DTYPES[pick_precision(args.precision, device)])
    controlnets = []
    for path in paths:
        controlnet, about = ControlNet.load(path)
        check_fit(controlnet, base, str(path))
        controlnets.append(controlnet)
        if own_scale:
            options = replace(options, guidance_scale=about.get("guidance_scale", options.guidance_scale))
    return HintSampler(base, controlnets, options)


def main(args) -> list[Path]:
    """Draw and write; returns the files written, PNG whatever their names.

    Raises:
        UserError: bad arguments, lines, hints or weights, or a folder that cannot be written; nothing is written then.
    """
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: starts at 1")
    pairs = read_pairs(args.table, args.keep_going, distinct_targets=True)
    if args.keep_going:
        pairs = readable_pairs(pairs, args.source, args.keep_going)
    sampler = sampler_from(args)
    hints = read_hints(pairs, args.source, sampler.size)
    with staged(args.out) as stage:
        for pair, picture in sampler.images(pairs, hints, args.batch_size):
            path = stage / pair.target
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil(picture).save(path, format="PNG")
    print(f"{len(pairs)} pictures in {args.out}")
    return [args.out / pair.target for pair in pairs]


if __name__ == "__main__":
    run(main, parse_arguments())
