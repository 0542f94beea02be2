"""Draw faces from noises, one PNG a noise, the way the course's ground truth was made.

python sample.py NOISE OUT UNet.pt   # the course's noises and weights: NOISE/00.pt becomes OUT/00.png, ...
python sample.py                     # the noises and weights that come with the project, into outputs/p2
python sample.py NOISE OUT --eta 1 --steps 100 --timestep-spacing trailing
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, add_options, options_from, run, say
from common.images import to_pil
from common.output import stage_folder
from common.runtime import PRECISIONS, pick_device
from p2_ddim.model import load_face_unet
from p2_ddim.noise import Noise, read_noises
from p2_ddim.sampler import DDIMOptions, FaceSampler

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights" / "faces.safetensors"
EXAMPLES = HERE / "examples"
OUTPUT = HERE.parent / "outputs" / "p2"


def add_sampling_arguments(parser: Parser, **defaults) -> None:
    """Add the flags of every program that draws faces; `defaults` differ from those of `DDIMOptions`."""
    group = parser.add_argument_group("sampling")
    add_options(group, DDIMOptions, **defaults)
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help="precision of the network; auto is fp32")
    group.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--compile", action="store_true", help="torch.compile the network, on a GPU with CUDA graphs")


def make_sampler(args) -> tuple[FaceSampler, DDIMOptions]:
    """The sampler and the options that the arguments describe; a `UserError` for a bad value, device or weights."""
    options = options_from(args, DDIMOptions)
    precision = "fp32" if args.precision == "auto" else args.precision
    sampler = FaceSampler(*load_face_unet(args.weights), pick_device(args.device), precision, args.compile)
    # A wrong number of steps is refused before anything is written.
    sampler.schedule.timesteps(options.steps, options.timestep_spacing)
    return sampler, options


def noises_for(sampler: FaceSampler, source: Path) -> list[Noise]:
    """The noises of a folder or a file, and a note on stderr if the network was trained on another size."""
    channels, *trained = sampler.shape
    noises = read_noises(source, channels, sampler.model.config.stride)
    if other := next((noise for noise in noises if noise.xt.shape != sampler.shape), None):
        sizes = [f"{width}x{height}" for height, width in (other.xt.shape[1:], trained)]
        print(f"note: {other.name} is {sizes[0]}, but these weights were trained on {sizes[1]}", file=sys.stderr)
    return noises


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="sample.py", description=__doc__)
    noise, path = EXAMPLES / "noise", {"type": Path, "nargs": "?"}
    parser.add_argument("noise", default=noise, metavar="NOISE", help="folder of noises, or one file", **path)
    parser.add_argument("out", default=OUTPUT, metavar="OUT", help="folder for the images", **path)
    parser.add_argument("weights", default=WEIGHTS, metavar="UNET", help="UNet.pt, or weights of train.py", **path)
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(args) -> list[Path]:
    """Draw and write; returns the files written."""
    sampler, options = make_sampler(args)
    noises = noises_for(sampler, args.noise)
    files = [f"{noise.name}.png" for noise in noises]
    with stage_folder(args.out, files) as stage:
        for file, (_, image) in zip(files, sampler.images(noises, options)):
            to_pil(image).save(stage / file)
    say(f"{len(noises)} images in {args.out}")
    return [args.out / file for file in files]


if __name__ == "__main__":
    run(main, parse_arguments())
