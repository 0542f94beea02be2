"""Learn several concepts together: new words, and the key and value matrices of the U-Net's cross-attention.

python concepts.py runs/concepts && python custom_diffusion.py
python custom_diffusion.py CATS POTS --initialiser cat pot --base sd-v1-4.ckpt --class-prompts FILE --lr 1e-5

So that the model keeps what else it knows, part of every batch are pictures of the concepts' class that the base drew
itself (prior preservation, Kumari et al. 2023). OUT/custom.safetensors gets all that differs from the base. Running the
same command again resumes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

from torch import Tensor

from common.checkpoint import hash_weights, load_about, load_tensors, save_tensors
from common.cli import Parser, UserError, check, option, options_from, run, say
from common.runtime import pick_device
from common.training_options import TrainingOptions, add_training_arguments, training_options
from latent_diffusion.base import Base, load_base
from latent_diffusion.drawing import PromptOptions, draw_prompts
from latent_diffusion.miniature import BASE
from latent_diffusion.miniature.scenes import random_scenes
from p3_personalization import learning
from p3_personalization.learning import ROOT, SHOWN, TEXTS, ConceptOptions, Learned
from p3_personalization.photos import ExampleBatches, encode, read_lines
from p3_personalization.words import KIND, check_prompts, matrix_names, save_custom

DEFAULTS = learning.DEFAULTS | {"steps": 250, "batch_size": 16, "lr": 3e-4, "sample_every": 200}
CLASS_STEPS = 20
SCENE_SIZE = 128  # pixels; only the scenes' prompts are used


@dataclass
class CustomOptions(ConceptOptions):
    """Also how prior preservation works."""

    out: Path = option(ROOT / "runs" / "p3_custom", "folder of the run")
    show: list[str] = option((), "further prompts to draw samples of", **TEXTS)
    class_share: float = option(0.75, "part of every batch that are pictures of the class")
    class_images: int = option(200, "pictures of the class, which the base draws once")
    class_prompts: Path = option(None, "prompts of the class, one a line (default for the shipped base: circles)")

    def __post_init__(self):
        super().__post_init__()
        check("class_share", self.class_share, 0 <= self.class_share < 1, "at least 0 and below 1")
        check("class_images", self.class_images, self.class_images >= 1, "at least 1")


def class_prompts(config: CustomOptions, seed: int) -> list[str]:
    """A prompt for each picture of the class: the lines of a file in turn, or for the shipped base circles."""
    if config.class_prompts:
        prompts = read_lines(config.class_prompts)
        return [prompts[k % len(prompts)] for k in range(config.class_images)]
    if config.base.resolve() != BASE:
        raise UserError("--class-prompts: name a file with prompts of the class, or give --class-share 0")
    return [scene.prompt for scene in random_scenes(config.class_images, SCENE_SIZE, seed, (1, 2), held_out=False)]


def class_pictures(base: Base, prompts: Sequence[str], seed: int, guidance_scale: float, path: Path) -> Tensor:
    """A picture of each prompt, drawn by the base or read from a file of the same: uint8 (N, 3, size, size)."""
    about = {"prompts": list(prompts), "seed": seed, "guidance_scale": guidance_scale, "steps": CLASS_STEPS}
    facts = base.unet.config.sample_size, base.vae.config.scaling_factor, base.prediction, base.schedule
    about["base"] = [hash_weights(part, part.dtype, *facts) for part in (base.unet, base.vae, base.text_encoder)]
    if path.exists() and load_about(path) == about:
        return load_tensors(path)[0]["images"]
    items = [(prompt, (9, k)) for k, prompt in enumerate(prompts)]
    images = draw_prompts(base, items, PromptOptions(CLASS_STEPS, seed, guidance_scale))
    save_tensors(path, {"images": images}, about)
    return images


def train(config: CustomOptions, options: TrainingOptions) -> Path:
    """Learn the concepts; returns the path of what differs from the base, `OUT/custom.safetensors`."""
    base = load_base(config.base, pick_device(options.device), cache=config.cache_dir)
    of_class = min(round(options.batch_size * config.class_share), options.batch_size - 1)
    prompts = class_prompts(config, options.seed) if of_class else []
    concepts = learning.read_concepts(config, base, options.seed)
    concepts.shown.extend(prompt for prompt in config.show for _ in range(SHOWN))
    check_prompts(concepts.base.tokenizer, concepts.shown + prompts)
    kinds, counts = [concepts.examples], [options.batch_size - of_class]
    if of_class:
        images = class_pictures(base, prompts, options.seed, config.guidance_scale, config.out / "class.safetensors")
        photos = [(image, [prompt]) for image, prompt in zip(images, prompts)]
        kinds.append(encode(concepts.base, photos, 1, 1.0, False, options.seed))
        counts.append(of_class)
    matrices = {name: base.unet.get_parameter(name).detach().float() for name in matrix_names(base.unet)}
    path, learned = config.out / "custom.safetensors", Learned(concepts.start, matrices)
    batches = ExampleBatches(kinds, counts, base.schedule.T, options.seed)
    trainer = learning.make_trainer(config, options, concepts, learned, batches, KIND)
    trainer.finish(lambda averaged, facts: save_custom(path, base, averaged.words(), averaged.unet_weights(), facts))
    say(f"{path}: {', '.join(learned.vectors)} and {len(matrices)} matrices")
    return path


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="custom_diffusion.py", description=__doc__)
    learning.add_concept_arguments(parser, CustomOptions)
    add_training_arguments(parser, **DEFAULTS)
    return parser.parse_args(argv)


def main(args) -> Path:
    """See `train`."""
    return train(options_from(args, CustomOptions), training_options(args))


if __name__ == "__main__":
    run(main, parse_arguments())
