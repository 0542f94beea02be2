"""Train the miniature Stable Diffusion that the ControlNet steers, one part after the other.

python p3_controlnet/fill50k.py runs/fill50k
python latent_diffusion/miniature/train.py vae  --data runs/fill50k --out runs/p3_base
python latent_diffusion/miniature/train.py clip --data runs/fill50k --out runs/p3_base
python latent_diffusion/miniature/train.py unet --data runs/fill50k --out runs/p3_base

Each writes its part of OUT/pipeline, a folder that diffusers' StableDiffusionPipeline runs; the unet needs the other
two. Running a command again resumes where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import Parser, UserError, run
from common.training_options import add_training_arguments, training_options
from latent_diffusion.miniature.models import SIZE
from latent_diffusion.miniature.pictures import read_pictures
from latent_diffusion.miniature.stage_clip import train_clip
from latent_diffusion.miniature.stage_unet import train_unet
from latent_diffusion.miniature.stage_vae import train_vae

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"vae": train_vae, "clip": train_clip, "unet": train_unet}
DEFAULTS = {
    "vae": {"steps": 6500, "batch_size": 16, "lr": 6e-4, "ema": 0.99},
    "clip": {"steps": 400, "batch_size": 256, "lr": 1e-3},
    "unet": {"steps": 3000, "batch_size": 64, "lr": 1e-3},
}


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="train.py", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="{vae,clip,unet}", help="the part")
    for name, function in STAGES.items():
        about = function.__doc__.splitlines()[0]
        stage = stages.add_parser(name, prog=f"train.py {name}", description=about, help=about)
        files = stage.add_argument_group("run")
        files.add_argument("--data", type=Path, default=ROOT / "runs" / "fill50k", help="folder with prompt.json")
        files.add_argument("--out", type=Path, default=ROOT / "runs" / "p3_base", help="folder of the run")
        loss = stage.add_argument_group("loss")
        if name == "vae":
            loss.add_argument("--kl-weight", type=float, default=1e-4, help="of the latents' divergence")
        if name == "unet":
            # None, because flat colours are settled where there is hardly any signal yet: the weighting would all but
            # leave those steps out, and with them most of what there is to learn from the prompt.
            loss.add_argument("--min-snr-gamma", type=float, default=0.0, help="loss weighting; 0 for none")
            loss.add_argument("--prompt-drop", type=float, default=0.1, help="part of the prompts left out")
        add_training_arguments(stage, **DEFAULTS[name])
    return parser.parse_args(argv)


def main(args) -> Path:
    """Train one part; returns the folder that it was written to.

    Raises:
        UserError: bad arguments or data, an earlier part is missing, a loss that is not finite, or a full disk.
    """
    options = training_options(args)
    if not 0 <= getattr(args, "prompt_drop", 0) <= 1:
        raise UserError(f"--prompt-drop {args.prompt_drop}: must be between 0 and 1")
    for name in ("kl_weight", "min_snr_gamma"):
        if not 0 <= getattr(args, name, 0) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 0")
    return STAGES[args.stage](args, options, *read_pictures(args.data, SIZE).split())


if __name__ == "__main__":
    run(main, parse_arguments())
