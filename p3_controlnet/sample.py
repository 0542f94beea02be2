"""Draw pictures that follow hints and prompts: a ControlNet steers a frozen latent diffusion model.

python sample.py prompt.json SOURCE OUT sd-v1-4.ckpt --controlnet PATH     # SOURCE/<source> becomes OUT/<target>
python sample.py prompt.json SOURCE OUT                                    # with the base that comes with the project
python sample.py                                                           # its examples, into outputs/p3
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, UserError, options_from, run, say
from common.images import to_pil
from common.output import stage_folder
from common.weights import open_weights
from latent_diffusion.drawing import add_drawing_flags, load_chosen_base
from latent_diffusion.files import count_changes
from latent_diffusion.miniature import BASE
from latent_diffusion.pairs import read_hints, read_pairs, readable_pairs
from p3_controlnet.model import ControlNet, check_fit
from p3_controlnet.sampler import HintOptions, HintSampler

HERE = Path(__file__).resolve().parent
CONTROLNET = HERE / "weights" / "controlnet"
# A student's own, for the real Stable Diffusion: here, or beside SD_CKPT.
OWN_CONTROLNET = HERE.parent / "checkpoints" / "controlnet_sd.safetensors"
EXAMPLES = HERE / "examples"
OUTPUT = HERE.parent / "outputs" / "p3"


def add_sampling_arguments(parser: Parser):
    """Add the flags of everything that draws with a ControlNet, see `load_sampler`; returns their group."""
    group, own = add_drawing_flags(parser, HintOptions), "/".join(OWN_CONTROLNET.parts[-2:])
    help = f"one or several ControlNets, folders or files (default: the shipped one, or with another base {own})"
    group.add_argument("--controlnet", type=Path, nargs="+", metavar="PATH", help=help)
    return group


def add_places(parser: Parser, out: str) -> None:
    """The table, the folder of the hints and the folder of the pictures; all may be left out."""
    for name, default, metavar, help in (
        ("table", EXAMPLES / "prompt.json", "JSON", "a line of JSON a picture: source, target and prompt"),
        ("source", EXAMPLES, "SOURCE", "folder of the hints"),
        ("out", OUTPUT, "OUT", out),
    ):
        parser.add_argument(name, type=Path, nargs="?", default=default, metavar=metavar, help=help)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="sample.py", description=__doc__)
    add_places(parser, "folder for the pictures")
    help = "the frozen model: Stable Diffusion v1 as one file or as a diffusers folder"
    parser.add_argument("base", type=Path, nargs="?", default=BASE, metavar="SD_CKPT", help=help)
    drawing = add_sampling_arguments(parser)
    drawing.add_argument("--keep-going", action="store_true", help="skip lines that cannot be drawn")
    return parser.parse_args(argv)


def default_controlnet(base: Path) -> Path:
    """The shipped ControlNet for the shipped base, a student's own for any other; a `UserError` if there is none."""
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


def load_sampler(args) -> tuple[HintSampler, HintOptions]:
    """The sampler and the options that the arguments describe; the guidance scale is the ControlNet's own if need be.

    A `UserError` for a value out of range, or weights that are missing, broken, or do not fit one another.
    """
    options = options_from(args, HintOptions)
    paths = args.controlnet or [default_controlnet(args.base)]
    base, controlnets = load_chosen_base(args), []
    for path in paths:
        controlnet, about = ControlNet.load(path)
        check_fit(controlnet, base, str(path))
        if path.is_file() and (changed := count_changes(open_weights(path), base.unet)):
            print(
                f"warning: {path}: {changed} of its U-Net's weights are not the base's, as sd_locked=False leaves them;"
                " to draw with those, give the file as SD_CKPT too",
                file=sys.stderr,
            )
        controlnets.append(controlnet)
        if args.guidance_scale is None:
            options = replace(options, guidance_scale=about.get("guidance_scale", options.guidance_scale))
    return HintSampler(base, controlnets), options


def main(args) -> list[Path]:
    """Draw and write; returns the files written, PNG whatever their names."""
    pairs = read_pairs(args.table, args.keep_going, distinct_targets=True)
    if args.keep_going:
        pairs = readable_pairs(pairs, args.source, args.keep_going)
    sampler, options = load_sampler(args)
    items = list(zip(pairs, read_hints(pairs, args.source, sampler.sides(options)[0])))
    with stage_folder(args.out, [pair.target for pair in pairs]) as stage:
        for (pair, _), picture in sampler.images(items, options):
            to_pil(picture).save(stage / pair.target, format="PNG")
    say(f"{len(pairs)} pictures in {args.out}")
    return [args.out / pair.target for pair in pairs]


if __name__ == "__main__":
    run(main, parse_arguments())
