"""Make two concepts for the miniature: discs of a colour that no word names, five pictures of each.

python concepts.py runs/concepts

OUT/0 and OUT/1 hold the pictures, each with a .txt of what may be said of it ({} stands for the new word), and
OUT/input.json is the table that the Fall 2024 grader gives.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from common.cli import Parser, UserError, run, say
from common.images import save_png, staged
from common.runtime import seeded_generator
from latent_diffusion.clip import Clip
from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.scenes import VISIBLE, Circle, Scene, draw_target, random_places, visible_against

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "latent_diffusion" / "miniature" / "weights" / "clip"
SIZE = 128  # pixels
# Wine and mustard: of vivid colours (L* from 25, chroma from 40) the farthest from all names, CIEDE2000 17.2 and 16.7.
CONCEPTS = {"<new1>": (120, 8, 56), "<new2>": (104, 80, 0)}
PROMPTS = ("{} circle with white background", "{} circle and gold circle with light gray background")
JUDGED = 25  # exact drawings of a prompt that the baseline is derived from
ENOUGH = 0.9  # of what exact drawings score


def nearest_name(colour: Sequence[int]) -> tuple[str, float]:
    """The named colour that looks most like an sRGB one, and how different it is: CIEDE2000."""
    distances = ciede2000(rgb_to_lab(list(COLOURS.values())), rgb_to_lab(colour))
    return list(COLOURS)[distances.argmin()], float(distances.min())


def concept_scenes(token: str, count: int, seed: int) -> list[Scene]:
    """Discs of a concept's colour at places of their own, each on another background that it can be told from.

    In every second scene it has a smaller disc of a named colour beside it, on its right and on its left in turns: what
    a word means in a sentence's first place, the text encoder does not know of it in its second.
    """
    colour = rgb_to_lab(CONCEPTS[token])
    visible = [name for name in COLOURS if np.linalg.norm(rgb_to_lab(COLOURS[name]) - colour) > VISIBLE]
    generator = seeded_generator(seed, 6, list(CONCEPTS).index(token))
    backgrounds = [visible[k] for k in torch.randperm(len(visible), generator=generator).tolist()]
    scenes = []
    for k, background in zip(range(count), backgrounds):
        places, colours = random_places(generator, 1 + k % 2, SIZE), [token]
        if k % 2:
            own = k // 2 % 2
            while places[own][2] <= places[1 - own][2]:
                places = random_places(generator, 2, SIZE)
            beside = [name for name in visible if name in visible_against(background)]
            colours.insert(1 - own, beside[int(torch.randint(len(beside), (1,), generator=generator))])
        scenes.append(Scene(tuple(Circle(*place, name) for place, name in zip(places, colours)), background))
    return scenes


def prompt_scenes(prompt: str, token: str, count: int) -> list[Scene]:
    """Scenes that one of PROMPTS describes, at places of their own."""
    discs, background = prompt.format(token).removesuffix(" background").split(" with ")
    names = [disc.removesuffix(" circle") for disc in discs.split(" and ")]
    places = (random_places(seeded_generator(0, 7, k), len(names), SIZE) for k in range(count))
    return [Scene(tuple(Circle(*p, name) for p, name in zip(place, names)), background) for place in places]


def draw(scene: Scene) -> np.ndarray:
    """A scene whose discs may have a concept's colour: uint8 (SIZE, SIZE, 3)."""
    return draw_target(scene, SIZE, COLOURS | CONCEPTS)


def baseline(clip: Clip, token: str, pictures: Sequence[np.ndarray], prompt: str) -> list[int]:
    """What the pictures of a prompt must reach: 90 % of the mean cosines, times 100, that exact drawings of it have.

    Args:
        clip: that the grader looks with.
        token: of the concept.
        pictures: that show it, uint8 (SIZE, SIZE, 3).
        prompt: one of PROMPTS.

    Returns:
        The cosine to the pictures and to the prompt with the colour's nearest name.
    """
    drawn = clip.embed_images([draw(scene) for scene in prompt_scenes(prompt, token, JUDGED)])
    text = clip.embed_texts([prompt.format(nearest_name(CONCEPTS[token])[0])])
    cosines = (drawn @ clip.embed_images(pictures).T).mean(), (drawn @ text.T).mean()
    return [math.floor(ENOUGH * 100 * float(cosine)) for cosine in cosines]


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="concepts.py", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "runs" / "concepts", metavar="OUT", help="folder")
    concepts = parser.add_argument_group("concepts")
    concepts.add_argument("--count", type=int, default=5, help="pictures of each concept")
    concepts.add_argument("--seed", type=int, default=0, help="of the places and backgrounds")
    concepts.add_argument("--clip", type=Path, default=CLIP, help="that the baselines are made with")
    return parser.parse_args(argv)


def main(args) -> Path:
    """Write the pictures and the table; returns the table's path.

    Raises:
        UserError: a count that is too small or too large, no CLIP, or a folder that cannot be written.
    """
    if not 1 <= args.count <= 100:
        raise UserError(f"--count {args.count}: must be 1 to 100")
    clip = Clip(args.clip)
    table = {}
    with staged(args.out) as stage:
        for number, (token, colour) in enumerate(CONCEPTS.items()):
            scenes = concept_scenes(token, args.count, args.seed)
            pictures = [draw(scene) for scene in scenes]
            for k, (scene, picture) in enumerate(zip(scenes, pictures)):
                save_png(stage / str(number) / f"{k}.png", torch.from_numpy(picture).permute(2, 0, 1))
                (stage / str(number) / f"{k}.txt").write_text(scene.prompt.replace(token, "{}") + "\n")
            table[str(number)] = {
                "src_image": "circle",
                "token_name": token,
                "prompt": [prompt.format(token) for prompt in PROMPTS],
                "prompt_4_clip_eval": [prompt.format(nearest_name(colour)[0]) for prompt in PROMPTS],
                "baseline": [baseline(clip, token, pictures, prompt) for prompt in PROMPTS],
            }
        (stage / "input.json").write_text(json.dumps(table, indent=2) + "\n")
    say(f"{args.out}: {args.count} pictures each of {', '.join(CONCEPTS)}, and input.json")
    return args.out / "input.json"


if __name__ == "__main__":
    run(main, parse_arguments())
