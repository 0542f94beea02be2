"""Draw faces from noises, one PNG a noise, the way the course's ground truth was made.

python sample.py NOISE OUT UNet.pt   # the course's noises and weights: NOISE/00.pt becomes OUT/00.png, ...
python sample.py                     # the noises and weights that come with the project, into outputs/p2
python sample.py NOISE OUT --eta 1 --steps 100 --timestep-spacing trailing
"""

import sys
from argparse import ArgumentTypeError, BooleanOptionalAction
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, run, say
from common.images import SAVE_RANGES, staged, to_pil
from common.runtime import PRECISIONS, pick_device
from common.schedule import SPACINGS
from p2_ddim.model import load_face_unet
from p2_ddim.noise import Noise, read_noises
from p2_ddim.sampler import DDIMOptions, FaceSampler

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights" / "faces.safetensors"
EXAMPLES = HERE / "examples"
OUTPUT = HERE.parent / "outputs" / "p2"


def count_or_auto(text: str) -> int | None:
    """A batch size from 1, or None for "auto"."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text}: choose auto or a whole number from 1")
    return int(text)


def add_sampling_arguments(parser: Parser) -> None:
    """The arguments of everything that draws faces; see `sampler_from` and `ddim_options`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=int, default=50, help="steps of the reverse process")
    group.add_argument("--eta", type=float, default=0.0, help="fresh noise: 0 none (DDIM), 1 as DDPM")
    group.add_argument("--timestep-spacing", choices=SPACINGS, default="leading", help="which timesteps are visited")
    group.add_argument(
        "--clip-x0", action=BooleanOptionalAction, default=True, help="clamp the predicted x0 to [-1, 1]"
    )
    group.add_argument(
        "--final-alpha", choices=("first", "one"), default="first", help="alphas_cumprod after the last step"
    )
    group.add_argument(
        "--save-range", choices=SAVE_RANGES, default="minmax", help="what becomes black and white in the PNG"
    )
    group.add_argument("--seed", type=int, default=0, help="of the fresh noise")
    group.add_argument("--batch-size", type=count_or_auto, default="auto", help="images at a time; bounds the memory")
    group.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of the network; auto is fp32, the ground truth's"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--compile", action="store_true", help="torch.compile the network, on a GPU with CUDA graphs")


def add_source_arguments(parser: Parser, output: Path) -> None:
    """The noises, the output folder and the weights, all of which may be left out."""
    parser.add_argument(
        "noise", type=Path, nargs="?", default=EXAMPLES / "noise", metavar="NOISE", help="folder of noises, or one file"
    )
    parser.add_argument("out", type=Path, nargs="?", default=output, metavar="OUT", help="folder for the images")
    parser.add_argument(
        "weights", type=Path, nargs="?", default=WEIGHTS, metavar="UNET", help="UNet.pt, or weights of train.py"
    )


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="sample.py", description=__doc__)
    add_source_arguments(parser, OUTPUT)
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def ddim_options(args) -> DDIMOptions:
    """The options among parsed arguments."""
    return DDIMOptions(**{field.name: getattr(args, field.name) for field in fields(DDIMOptions)})


def sampler_from(args) -> FaceSampler:
    """The sampler that the arguments describe.

    Raises:
        UserError: the weights are missing, truncated, carry code or do not fit, or there is no such device.
    """
    precision = "fp32" if args.precision == "auto" else args.precision
    return FaceSampler(*load_face_unet(args.weights), pick_device(args.device), precision, args.compile)


def noises_for(sampler: FaceSampler, source: Path) -> list[Noise]:
    """The noises of a folder, and a word on stderr if the network was trained on another size than theirs."""
    config, trained = sampler.model.config, sampler.about["image_size"]
    noises = read_noises(source, config.image_channels, config.stride)
    if other := next((noise for noise in noises if noise.xt.shape[1:] != (trained, trained)), None):
        height, width = other.xt.shape[1:]
        print(
            f"note: {other.name} is {width}x{height}, but these weights were trained on {trained}x{trained}",
            file=sys.stderr,
        )
    return noises


def main(args) -> list[Path]:
    """Draw and write; returns the files written.

    Raises:
        UserError: bad arguments, noises or weights, or a folder that cannot be written; nothing is written then.
    """
    options = ddim_options(args)
    sampler = sampler_from(args)
    options.timesteps(sampler.schedule)
    noises = noises_for(sampler, args.noise)
    with staged(args.out) as stage:
        for noise, image in sampler.faces(noises, options, args.batch_size):
            to_pil(image).save(stage / f"{noise.name}.png")
    say(f"{len(noises)} images in {args.out}")
    return [args.out / f"{noise.name}.png" for noise in noises]


if __name__ == "__main__":
    run(main, parse_arguments())
