"""Write a file like sd-v1-4.ckpt, of the same names and sizes, whose weights are random.

    python benchmarks/make_sd_like.py /tmp/sd-v1-4-like.ckpt                          # 4.3 GB
    python benchmarks/make_sd_like.py /tmp/control-like.safetensors --kind controlnet # 1.4 GB

It loads and draws like the published file, at the same cost; what it draws is noise.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from common.checkpoint import save_tensors, write_atomically
from common.cli import Parser, UserError, progress, run, say
from common.schedule import NoiseSchedule

KEYS = Path(__file__).resolve().parent.parent / "latent_diffusion" / "v1" / "published_weights.json"
KINDS = {"sd_v1": ".ckpt", "controlnet": ".safetensors"}
POSITIONS = "position_ids"


def random_weights(shapes: Mapping[str, Sequence[int]], seed: int = 6) -> dict[str, Tensor]:
    """Weights of these names and shapes under which activations neither vanish nor overflow; float32.

    A matrix or convolution keeps the variance of what it is given, a norm's weights are near 1, and biases near 0.
    """
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in progress(list(shapes.items()), "weights", "tensor"):
        if name.endswith(POSITIONS):
            state[name] = torch.arange(shape[-1])[None]
            continue
        tensor = torch.randn(tuple(shape), generator=generator)
        if len(shape) == 1:
            state[name] = tensor.mul_(0.1).add_(float(name.endswith(".weight")))  # only norms have such weights
        else:
            state[name] = tensor.div_(tensor[0].numel() ** 0.5)
    return state


def like_training_left_it(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The content of a published file: the weights, the schedule's buffers, and what else training had to remember."""
    schedule = NoiseSchedule("scaled-linear", beta_start=0.00085, beta_end=0.012)
    buffers = {"betas": schedule.betas.float(), "alphas_cumprod": schedule.alphas_cumprod.float()}
    return {"epoch": 13, "global_step": 470_000, "state_dict": {**buffers, **state}}


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="make_sd_like.py", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    content = parser.add_argument_group("content")
    content.add_argument("--kind", choices=KINDS, default="sd_v1", help="of what published file")
    content.add_argument("--keys", type=Path, default=KEYS, help="JSON: for each kind the shapes by their names")
    content.add_argument("--seed", type=int, default=6, help="of the weights")
    return parser.parse_args(argv)


def main(args) -> Path:
    """Write the file; returns its path.

    Raises:
        UserError: another suffix than the kind's, no such list of names, or a file that cannot be written.
    """
    if args.out.suffix != KINDS[args.kind]:
        raise UserError(f"{args.out}: name a {KINDS[args.kind]} file for {args.kind}")
    try:
        shapes = json.loads(args.keys.read_text())[args.kind]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{args.keys}: no list of {args.kind} ({type(error).__name__}); restore it") from None
    state = random_weights(shapes, args.seed)
    if args.kind == "sd_v1":
        content = like_training_left_it(state)
        write_atomically(args.out, lambda temporary: torch.save(content, temporary))
    else:
        save_tensors(args.out, state, {})
    say(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB, {len(state)} weights like {args.kind}'s")
    return args.out


if __name__ == "__main__":
    run(main, parse_arguments())
