"""Draw pictures that follow hints and prompts: a ControlNet steers a frozen latent diffusion model.

python sample.py prompt.json SOURCE OUT sd-v1-4.ckpt --controlnet PATH     # hints SOURCE/<source> become OUT/<target>
python sample.py prompt.json SOURCE OUT                                    # with the base that comes with the project
python sample.py                                                           # its examples, into outputs/p3
"""

import sys
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, UserError, run, say
from common.images import staged, to_pil
from latent_diffusion.drawing import GUIDANCE_SCALE, add_drawing_flags, load_chosen_base
from latent_diffusion.pairs import read_hints, read_pairs, readable_pairs
from p3_controlnet.model import ControlNet, check_fit
from p3_controlnet.sampler import HintSampler, SamplingOptions

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "latent_diffusion" / "miniature" / "weights" / "base"
CONTROLNET = HERE / "weights" / "controlnet"
# A student's own, for the real Stable Diffusion: here, or beside SD_CKPT.
OWN_CONTROLNET = HERE.parent / "checkpoints" / "controlnet_sd.safetensors"
EXAMPLES = HERE / "examples"
OUTPUT = HERE.parent / "outputs" / "p3"


def add_sampling_arguments(parser: Parser) -> None:
    """The arguments of everything that draws with a ControlNet; see `sampler_from`."""
    group = add_drawing_flags(parser, "ddim", "the ControlNet's own")
    group.add_argument(
        "--controlnet",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="one or several, summed; folders or files (default: the shipped one, or with another base"
        f" {'/'.join(OWN_CONTROLNET.parts[-2:])})",
    )
    group.add_argument("--size", type=int, metavar="PIXELS", help="side of the pictures (default: the base's)")
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
    lines = parser.add_argument_group("lines")
    lines.add_argument("--keep-going", action="store_true", help="leave out lines that cannot be drawn")
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
    base = load_chosen_base(args)
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
    say(f"{len(pairs)} pictures in {args.out}")
    return [args.out / pair.target for pair in pairs]


if __name__ == "__main__":
    run(main, parse_arguments())
