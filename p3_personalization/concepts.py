"""Make two concepts for the miniature: discs of a colour that has no name, five pictures of each.

python concepts.py runs/concepts

OUT/0 and OUT/1 get the pictures, each with a .txt of its caption ({} stands for the new word), and OUT/input.json is a
table as the Fall 2024 grader gives it.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # isort: split

import numpy as np
import torch

from common.cli import Parser, check, run, say
from common.images import save_png
from common.output import stage_folder
from common.runtime import seeded_generator
from latent_diffusion.clip import Clip
from latent_diffusion.miniature import CLIP
from latent_diffusion.miniature.colours import COLOURS, ciede2000, rgb_to_lab
from latent_diffusion.miniature.scenes import VISIBLE, Circle, Scene, draw_target, random_places, visible_against

ROOT = Path(__file__).resolve().parent.parent
SIZE = 128  # pixels
# Wine and mustard, the vivid colours (L* from 25, chroma from 40) farthest from every named one: CIEDE2000 17.2, 16.7.
CONCEPTS = {"<new1>": (120, 8, 56), "<new2>": (104, 80, 0)}
PROMPTS = ("{} circle with white background", "{} circle and gold circle with light gray background")
EXACT = 25  # exact drawings of a prompt that its baseline is measured on
ENOUGH = 0.9  # of what exact drawings score


def nearest_name(colour: Sequence[int]) -> str:
    """The named colour that looks most like an sRGB one (CIEDE2000)."""
    return list(COLOURS)[ciede2000(rgb_to_lab(list(COLOURS.values())), rgb_to_lab(colour)).argmin()]


def concept_scenes(token: str, count: int, seed: int) -> list[Scene]:
    """Discs of a concept's colour in random places, each on another background that it stands out from.

    Every second scene also has a smaller disc of a named colour, on the right and on the left in turns. Learned from
    single discs alone, a word means nothing where it comes second in a sentence.
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
    """Scenes that one of PROMPTS describes, with discs in random places."""
    discs, background = prompt.format(token).removesuffix(" background").split(" with ")
    names = [disc.removesuffix(" circle") for disc in discs.split(" and ")]
    places = (random_places(seeded_generator(0, 7, k), len(names), SIZE) for k in range(count))
    return [Scene(tuple(Circle(*p, name) for p, name in zip(place, names)), background) for place in places]


def draw_scene(scene: Scene) -> np.ndarray:
    """A scene whose discs may have a concept's colour: uint8 (SIZE, SIZE, 3)."""
    return draw_target(scene, SIZE, COLOURS | CONCEPTS)


def measure_baseline(clip: Clip, token: str, pictures: Sequence[np.ndarray], prompt: str) -> list[int]:
    """The image and text score that one of PROMPTS must reach: 90 % of what exact drawings of it score.

    `pictures` are the concept's; in the text the colour's nearest name takes the token's place.
    """
    drawn = clip.embed_images([draw_scene(scene) for scene in prompt_scenes(prompt, token, EXACT)])
    text = clip.embed_texts([prompt.format(nearest_name(CONCEPTS[token]))])
    cosines = (drawn @ clip.embed_images(pictures).T).mean(), (drawn @ text.T).mean()
    return [math.floor(ENOUGH * 100 * float(cosine)) for cosine in cosines]


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="concepts.py", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "runs" / "concepts", metavar="OUT", help="folder")
    concepts = parser.add_argument_group("concepts")
    concepts.add_argument("--count", type=int, default=5, help="pictures of each concept")
    concepts.add_argument("--seed", type=int, default=0, help="seed of the places and backgrounds")
    concepts.add_argument("--clip", type=Path, default=CLIP, help="CLIP that the baselines are measured with")
    return parser.parse_args(argv)


def main(args) -> Path:
    """Write the pictures and the table; returns the table's path."""
    check("count", args.count, 1 <= args.count <= 100, "1 to 100")
    clip = Clip(args.clip)
    table = {}
    with stage_folder(args.out) as stage:
        for number, (token, colour) in enumerate(CONCEPTS.items()):
            scenes = concept_scenes(token, args.count, args.seed)
            pictures = [draw_scene(scene) for scene in scenes]
            for k, (scene, picture) in enumerate(zip(scenes, pictures)):
                save_png(stage / str(number) / f"{k}.png", torch.from_numpy(picture).permute(2, 0, 1))
                (stage / str(number) / f"{k}.txt").write_text(scene.prompt.replace(token, "{}") + "\n")
            table[str(number)] = {
                "src_image": "circle",
                "token_name": token,
                "prompt": [prompt.format(token) for prompt in PROMPTS],
                "prompt_4_clip_eval": [prompt.format(nearest_name(colour)) for prompt in PROMPTS],
                "baseline": [measure_baseline(clip, token, pictures, prompt) for prompt in PROMPTS],
            }
        (stage / "input.json").write_text(json.dumps(table, indent=2) + "\n")
    say(f"{args.out}: {args.count} pictures each of {', '.join(CONCEPTS)}, and input.json")
    return args.out / "input.json"


if __name__ == "__main__":
    run(main, parse_arguments())
