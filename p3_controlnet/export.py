"""Write a ControlNet in another program's layout, whatever layout it was read in.

python export.py ../runs/p3/controlnet ../checkpoints/controlnet_sd.safetensors    # the original's, one file
python export.py control_sd15_canny.pth ../runs/canny --layout diffusers           # diffusers', a folder
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.checkpoint import save_tensors, to_half
from common.cli import Parser, UserError, run, say
from latent_diffusion.files import original_controlnet_names
from p3_controlnet.model import ControlNet, ControlNetConfig

# What a reader can tell from the weights' shapes; the original's other sizes are always Stable Diffusion v1's.
SHOWN = ("block_out_channels", "cross_attention_dim", "conditioning_embedding_out_channels")


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="export.py", description=__doc__)
    parser.add_argument("controlnet", type=Path, metavar="CONTROLNET", help="a folder, or one file")
    parser.add_argument("out", type=Path, metavar="OUT", help="a .safetensors file, or diffusers' folder")
    weights = parser.add_argument_group("weights")
    weights.add_argument(
        "--layout", choices=("original", "diffusers"), default="original", help="how weights are named"
    )
    weights.add_argument("--fp32", action="store_true", help="write fp32, twice the size, to train on from it")
    return parser.parse_args(argv)


def main(args) -> Path:
    """Read and write; returns what was written."""
    controlnet, about = ControlNet.load(args.controlnet)
    if args.layout == "diffusers":
        if args.out.is_file():
            raise UserError(f"{args.out}: is a file; name a folder for the diffusers layout")
        controlnet.save(args.out, about, fp16=not args.fp32)
    else:
        if args.out.is_dir() or args.out.suffix != ".safetensors":
            raise UserError(f"{args.out}: name a .safetensors file for the original layout")
        if controlnet.config != replace(
            ControlNetConfig(), **{name: getattr(controlnet.config, name) for name in SHOWN}
        ):
            raise UserError(f"{args.controlnet}: its base is built unlike Stable Diffusion v1; add --layout diffusers")
        names = original_controlnet_names()
        state = {names[name]: tensor for name, tensor in controlnet.state_dict().items()}
        save_tensors(args.out, state if args.fp32 else to_half(state), {})
    say(f"{args.out}: a ControlNet in the {args.layout} layout")
    return args.out


if __name__ == "__main__":
    run(main, parse_arguments())
