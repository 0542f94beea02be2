"""Learn new words from a few photos: rows of the text encoder's embedding table, and nothing else (Gal et al. 2022).

python concepts.py runs/concepts && python textual_inversion.py
python textual_inversion.py PHOTOS --token "<new1>" --initialiser dog --base sd-v1-4.ckpt --lr 5e-3 --steps 3000

Each folder of photos is one concept. A .txt beside a photo holds its captions, one a line, with {} for the word; a
templates.txt holds the captions of all photos without one. All words go to OUT/words.safetensors. Running the same
command again resumes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, options_from, run, say
from common.runtime import pick_device
from common.training_options import TrainingOptions, add_training_arguments, training_options
from latent_diffusion.base import load_base
from p3_personalization import learning
from p3_personalization.learning import ConceptOptions, Learned
from p3_personalization.photos import ExampleBatches
from p3_personalization.words import save_words

DEFAULTS = learning.DEFAULTS | {"steps": 400, "batch_size": 8, "lr": 2e-3, "sample_every": 500}


def train(config: ConceptOptions, options: TrainingOptions) -> Path:
    """Learn the words; returns the path of their file, `OUT/words.safetensors`."""
    base = load_base(config.base, pick_device(options.device), cache=config.cache_dir)
    concepts = learning.read_concepts(config, base, options.seed)
    path, learned = config.out / "words.safetensors", Learned(concepts.start)
    batches = ExampleBatches([concepts.examples], [options.batch_size], base.schedule.T, options.seed)
    trainer = learning.make_trainer(config, options, concepts, learned, batches, kind="words")
    trainer.finish(lambda averaged, facts: save_words(path, averaged.words(), facts))
    say(f"{path}: {', '.join(learned.vectors)}")
    return path


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="textual_inversion.py", description=__doc__)
    learning.add_concept_arguments(parser, ConceptOptions)
    add_training_arguments(parser, **DEFAULTS)
    return parser.parse_args(argv)


def main(args) -> Path:
    """See `train`."""
    return train(options_from(args, ConceptOptions), training_options(args))


if __name__ == "__main__":
    run(main, parse_arguments())
