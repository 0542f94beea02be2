"""The four pages: what can be set, and how the problems' own samplers draw it."""

import math
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.cli import UserError, check, options_from
from common.images import grid, to_pil, to_uint8
from common.weights import open_weights
from latent_diffusion.drawing import PromptOptions, PromptSampler
from latent_diffusion.miniature.colours import COLOURS
from latent_diffusion.miniature.scenes import Circle, Scene, draw_hint, read_prompt
from latent_diffusion.pairs import Pair
from p1_ddpm.digits import DOMAINS, Digit
from p1_ddpm.sample import DigitOptions, DigitSampler
from p2_ddim.figures import plot_lengths
from p2_ddim.model import load_face_unet
from p2_ddim.noise import METHODS, Noise, between, random_noises
from p2_ddim.sampler import DDIMOptions, FaceSampler
from p3_controlnet.sample import default_controlnet, load_sampler
from p3_controlnet.sampler import HintOptions, HintSampler
from p3_personalization import generate
from p3_personalization.words import FORM, check_prompts, load_words, with_learned
from studio.parts import Control, Figures, Kept, Page, Values, drawing_controls


def enlarge(images: Tensor, side: int, columns: int = 1, gap: int = 0) -> Image.Image:
    """Images, uint8 (N, 3, H, W), in rows, each enlarged to about `side` pixels."""
    return to_pil(grid(images, columns, max(1, side // images.shape[-1]), gap))


class Digits(Page):
    """A digit drawn several times, and the way there; from a finished model or a training state."""

    name, title, figures = "digits", "Digits", ("xt", "the x0 predicted from it")
    text = (
        "A digit drawn several times from different noises. Guidance 1 is off; more makes digits surer and more alike."
    )

    def __init__(self, weights: Path, device: torch.device, precision: str):
        self.weights = weights
        self.read = Kept(lambda path: DigitSampler(path, device, precision))
        try:
            domains = self.read(weights).domains
        except UserError:  # it is told when one draws
            domains = DOMAINS
        last = max(domains.values()) - 1
        self.controls = [
            {"domain": Control("domain", next(iter(domains)), options=list(domains))},
            {"label": Control("digit", min(7, last), 0, last)},
            {"count": Control("images", 8, 1, 16)},
            *drawing_controls(DigitOptions, 200),
        ]

    def steps(self, values: Values) -> Iterator[list[tuple[int | None, Tensor, Tensor]]]:
        """The moments so far of images number 1 to `count`, as sample.py draws them, one more with every step.

        A moment is t, xt, and the x0 predicted from it, both uint8 (N, 3, H, W); the end is None and twice the images.
        """
        sampler, options = self.read(self.weights), options_from(Namespace(**values), DigitOptions)
        check("steps", options.steps, options.steps <= sampler.schedule.T, f"at most {sampler.schedule.T}")
        digits = [Digit(values["domain"], values["label"], k + 1) for k in range(values["count"])]
        xt, moments = to_uint8(sampler.noise(digits, options)), []
        for step in sampler.walk(digits, options):
            moments.append((step.t, xt, to_uint8(step.x0)))
            xt = to_uint8(step.xt)
            yield [*moments, (None, xt, xt)] if len(moments) == options.steps else moments


def show_moment(moments: Sequence[tuple], position: float | None) -> Figures:
    """The moment of `Digits.steps` that is nearest to a position (None: the first): xt and predicted x0."""
    t, *states = moments[min(max(0, int(position or 0)), len(moments) - 1)]
    captions = (f"xt at t = {t}", Digits.figures[1]) if t is not None else ("the end: images", "the same")
    return [(caption, enlarge(images, 112, min(4, len(images)), 2)) for caption, images in zip(captions, states)]


@lru_cache(maxsize=1)
def make_ends(first: int, second: int, shape: tuple[int, ...]) -> tuple[Noise, Noise, Image.Image]:
    """Two noises of seed 0 by their numbers, at 64x64 those of `p2_ddim/examples/noise`, and a plot of |xT| between."""
    noises = random_noises(max(first, second) + 1, shape, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        plot_lengths(Path(folder) / "lengths.png", noises[first], noises[second])
        return noises[first], noises[second], Image.open(Path(folder) / "lengths.png").convert("RGB")


class Faces(Page):
    """The faces between two noises, on the sphere and on the straight line; weights, see `load_face_unet`, may come."""

    name, title, figures = "faces", "Two faces", ("first", *METHODS, "second")
    text = (
        "Gaussian noise of D values has length √D, almost exactly. Slerp, the great circle between two noises, keeps"
        " that length; lerp, the straight line, cuts through the sphere, and the network has never seen noise so short."
        " Faces are drawn by DDIM with eta 0."
    )
    live = (
        {f"noise{k}": Control(f"noise {k}", k - 1, 0, 99, typed=True) for k in (1, 2)},
        {"alpha": Control("alpha", 0.5, 0, 1, step=0.01)},
    )
    controls = (*live, {"steps": Control("steps", 20, 1, 200)})

    def __init__(self, weights: Path, device: torch.device):
        self.weights = weights
        self.read = Kept(lambda path: FaceSampler(*load_face_unet(path), device))

    def note(self) -> str:
        mend = "train some with p2_ddim/train.py, or name the course's UNet.pt with --face-weights"
        return "" if self.weights.exists() else f"There are no face weights at {self.weights} yet; {mend}."

    def noises(self, values: Values) -> tuple[list[Noise], Image.Image]:
        """The first noise, those between on the sphere and on the line, and the second; and the plot of `make_ends`."""
        shape = self.read(self.weights).shape if self.weights.exists() else (3, 64, 64)
        a, b, plot = make_ends(values["noise1"], values["noise2"], shape)
        return [a, *(between(a, b, method, [values["alpha"]])[0] for method in METHODS), b], plot

    def preview(self, values: Values) -> tuple[str, Image.Image]:
        """|xT| on both ways at alpha, as a line, and all along them, as a plot; a `UserError` as `check`."""
        noises, plot = self.noises(self.check(values))
        told = ", ".join(f"{method} {noise.xt.norm():.1f}" for method, noise in zip(METHODS, noises[1:]))
        return f"|xT| at this alpha: {told}; √D = {math.sqrt(noises[0].xt.numel()):.1f}", plot

    def steps(self, values: Values) -> Iterator[Figures]:
        """The four faces; until the last step they are what the network predicts by then."""
        sampler, options = self.read(self.weights), DDIMOptions(steps=values["steps"])
        for done, step in enumerate(sampler.walk(self.noises(values)[0], options), start=1):
            images = to_uint8(step.x0 if done < options.steps else step.xt, options.save_range)
            yield [(name, enlarge(image[None], 256)) for name, image in zip(self.figures, images)]


# x, y and radius in per cent of the picture's side: bounds, and first values of both circles.
PLACE = {"x": (0, 100, 33, 72), "y": (0, 100, 45, 60), "radius": (1, 50, 20, 15)}


class Circles(Page):
    """Circles placed by hand, and the picture that a ControlNet makes of them; `args` are p3_controlnet/sample.py's."""

    name, title, figures = "circles", "Circles", ("picture",)
    text = (
        "The outlines say where, the prompt says in which colours. Click into the outlines to move the nearest circle"
        " there, or use the sliders, which are in per cent of the side. Strength 0 leaves the outlines out."
    )
    live = (
        {"circles": Control("circles", 2, 1, 2), "background": Control("background", "pink", options=list(COLOURS))},
        *(
            {f"{name}{k}": Control(f"circle {k}: {name}", (first, second)[k - 1], low, high) for k in (1, 2)}
            for name, (low, high, first, second) in PLACE.items()
        ),
        {
            f"colour{k + 1}": Control(f"circle {k + 1}: colour", ("gold", "navy")[k], options=list(COLOURS))
            for k in (0, 1)
        },
    )
    controls = (
        *live,
        {"prompt": Control("prompt", "gold circle and navy circle with pink background")},
        {"strength": Control("strength of the control", 1, 0, 2, step=0.05)},
        *drawing_controls(HintOptions, 100, guidance_scale=2, steps=10, sampler="dpm-solver++"),
    )

    def __init__(self, args: Namespace):
        self.args = args
        self.read = Kept(lambda _, *controlnets: load_sampler(Namespace(**vars(args) | {"controlnet": controlnets})))

    def sampler(self) -> tuple[HintSampler, HintOptions]:
        """The sampler with the weights as they are now, and its own options; a `UserError` as `load_sampler`."""
        return self.read(self.args.base, *(self.args.controlnet or [default_controlnet(self.args.base)]))

    def note(self) -> str:
        self.sampler()
        return ""

    def scene(self, values: Values, size: int) -> Scene:
        """The circles that checked values place, from left to right in a picture of `size` pixels."""
        circles = [
            Circle(*(values[f"{name}{k}"] * size / 100 for name in PLACE), values[f"colour{k}"])
            for k in range(1, values["circles"] + 1)
        ]
        return Scene(tuple(sorted(circles, key=lambda circle: circle.x)), values["background"])

    def preview(self, values: Values) -> tuple[str, Image.Image]:
        """The course's sentence, colours from left to right, and the outlines; a `UserError` as `check`."""
        scene = self.scene(self.check(values), 512)
        return scene.prompt, Image.fromarray(draw_hint(scene, 512))

    def move_nearest(self, values: Values, x: float, y: float) -> dict[str, int]:
        """What changes when the circle whose centre is nearest to a point moves there; a `UserError` as `check`."""
        values = self.check(values)
        distance = {k: math.dist((values[f"x{k}"], values[f"y{k}"]), (x, y)) for k in range(1, values["circles"] + 1)}
        nearest = min(distance, key=distance.get)
        return {f"x{nearest}": round(x), f"y{nearest}": round(y)}

    def steps(self, values: Values) -> Iterator[Figures]:
        """What is predicted by then, at last the picture."""
        sampler, _ = self.sampler()
        given = vars(self.args) | values | {"control_scale": (values["strength"],)}
        options = options_from(Namespace(**given), HintOptions)
        size = sampler.sides(options)[0]
        outlines = torch.tensor(draw_hint(self.scene(values, size), size)).permute(2, 0, 1)
        pair = Pair("outlines", "picture.png", values["prompt"], "prompt")
        for done, step in enumerate(sampler.walk([(pair, outlines)], options), start=1):
            images = to_uint8(sampler.base.decode(step.x0 if done < options.steps else step.xt))
            yield [("picture", enlarge(images, 384))]

    def remark(self, values: Values) -> str:
        """What to expect of a prompt that the miniature has seen nothing like."""
        colours, background = read_prompt(values["prompt"]) or ([], "")
        known = COLOURS.keys() >= {*colours, background} or not generate.is_miniature(self.args.base)
        return "" if known else "The miniature has only read sentences like the first one, with the lists' colours."


class Words(Page):
    """Prompts with learned words, which may come later; `args` are those of p3_personalization/generate.py."""

    name, title, figures, unit = "words", "Learned words", ("pictures",), ("picture", "count")
    text = (
        "A learned word is a row of the text encoder's table, trained on a few pictures of one thing. Custom Diffusion"
        " learned it with matrices of the U-Net, and alone can put two learned words into one picture."
    )

    def __init__(self, args: Namespace):
        self.args = args
        self.plain = Kept(lambda _: generate.load_plain(args))
        self.read = {
            generate.INVERSION: Kept(lambda base, *words: with_learned(self.plain(base), words)),
            generate.CUSTOM_DIFFUSION: Kept(lambda base, custom: with_learned(self.plain(base), [], custom)),
        }
        scale = generate.drawing_options(args).scale
        self.controls = [
            {"prompt": Control("prompt", "gold circle with navy background")},
            {"way": Control("learned by", generate.INVERSION, options=list(self.read))},
            {"count": Control("pictures", 4, 1, 8)},
            *drawing_controls(PromptOptions, 100, guidance_scale=scale, steps=10, sampler="dpm-solver++"),
        ]

    def files(self, way: str) -> list[Path]:
        """What was learned one way: the files named, or the usual one if it is there; raises as `default_words`."""
        args, inversion = self.args, way == generate.INVERSION
        if named := args.words if inversion else args.custom and [args.custom]:
            return named
        usual = [generate.CUSTOM] if generate.is_miniature(args.base) else []
        return [file for file in ([generate.default_words(args.base)] if inversion else usual) if file.exists()]

    def note(self) -> str:
        tokens = [*load_words(*self.files(generate.INVERSION))]
        for path in self.files(generate.CUSTOM_DIFFUSION):
            tokens += filter(FORM.fullmatch, open_weights(path).shapes)  # the matrices beside them may be large
        mend = "nothing yet; run p3_personalization/textual_inversion.py, and name its file with --words"
        return f"Learned: {', '.join(dict.fromkeys(tokens)) or mend}"

    def steps(self, values: Values) -> Iterator[Figures]:
        """The pictures so far, the first ones that generate.py draws, in one."""
        prompt, count, files = values["prompt"], values["count"], self.files(values["way"])
        if values["way"] == generate.CUSTOM_DIFFUSION and not files:
            mend = "run p3_personalization/custom_diffusion.py, and name its file with --custom"
            raise UserError(f"Custom Diffusion learned nothing for this base yet; {mend}")
        base, images = self.read[values["way"]](self.args.base, *files), []
        check_prompts(base.tokenizer, [prompt])
        options = options_from(Namespace(**values, batch_size=1), PromptOptions)
        for _, image in PromptSampler(base).images(generate.prompt_items(prompt, count), options):
            images.append(image)
            yield [("pictures", enlarge(torch.stack(images), 256, min(4, count), 2))]
