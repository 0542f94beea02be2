"""Learn several concepts together: new words, and the key and value matrices of the U-Net's cross-attention.

python concepts.py runs/concepts && python custom_diffusion.py
python custom_diffusion.py CATS POTS --initialiser cat pot --base sd-v1-4.ckpt --class-prompts FILE --lr 1e-5

A part of every batch are pictures of the class that the base drew itself, so that it does not forget what else it knows
(Kumari et al. 2023). OUT/custom.safetensors has all that differs from the base. Running the same command again resumes.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from common.checkpoint import load_about, load_tensors, save_tensors
from common.cli import Parser, UserError, run, say
from common.images import grid
from common.runtime import pick_device, seeded_generator
from common.training import Trainer
from common.training_options import add_training_arguments, training_options
from latent_diffusion.base import Base, load_base
from latent_diffusion.drawing import draw_prompts
from latent_diffusion.miniature.scenes import random_scenes
from p3_personalization.learning import ExampleBatches, Learned, learning_loss, watched
from p3_personalization.textual_inversion import (
    BASE,
    SHOWN,
    STEPS,
    add_concept_arguments,
    notes_of,
    read_concepts,
    shown_prompts,
)
from p3_personalization.views import Told, encode
from p3_personalization.words import FORM, Words, add_words, check_prompts, with_shared_weights

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = {
    "steps": 250, "batch_size": 16, "lr": 3e-4, "weight_decay": 0.0, "warmup": 10, "ema": 0.0,
    "validate_every": 100, "sample_every": 200, "save_every": 100,
}  # fmt: skip
CLASS_STEPS = 20
SCENE_SIZE = 128  # pixels; only the scenes' colours are used
KIND = "CustomDiffusion"
# Ends of the matrices' names in a U-Net, and in the files of diffusers.
MATRICES = {f".attn2.to_{kind}.weight": f".attn2.processor.to_{kind}_custom_diffusion.weight" for kind in ("k", "v")}


def matrix_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """The names of the matrices that make keys and values of the context: in the U-Net, and in files."""
    return {
        name: name.removesuffix(end) + MATRICES[end]
        for name, _ in unet.named_parameters()
        for end in MATRICES
        if name.endswith(end)
    }


def save_custom(path: Path, base: Base, words: Words, matrices: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write all that differs from the base as one safetensors file: words under their tokens, matrices in float32.

    Matrices are named as diffusers' `UNet2DConditionModel.load_attn_procs` wants them, with an empty tensor for every
    self-attention, which nothing changed. It takes them as a dict, without the words, and diffusers 0.42 ignores them
    unless it is given the pipeline too:

        tensors = load_file(path)
        words = {token: tensors.pop(token) for token in list(tensors) if token.startswith("<")}
        pipeline.load_textual_inversion([{token: rows} for token, rows in words.items()])
        pipeline.unet.load_attn_procs(tensors, _pipeline=pipeline)

    Raises:
        UserError: the file cannot be written.
    """
    names = matrix_names(base.unet)
    tensors = {names[name]: matrix.float() for name, matrix in matrices.items()}
    tensors |= {name: torch.empty(0) for name in base.unet.attn_processors if ".attn1." in name}
    save_tensors(path, {token: rows.float() for token, rows in words.items()} | tensors, {"kind": KIND} | dict(about))


def with_matrices(unet: UNet2DConditionModel, matrices: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """A U-Net that has other matrices, and shares all else with the given one, which stays as it is."""
    changed = with_shared_weights(unet)
    for name, matrix in matrices.items():
        layer, _, kind = name.rpartition(".")
        matrix = matrix.detach().to(unet.device, unet.dtype)
        setattr(changed.get_submodule(layer), kind, nn.Parameter(matrix, requires_grad=False))
    return changed


def load_custom(base: Base, path: Path) -> Base:
    """A base with what `save_custom` wrote; everything else in it is the given base's, which stays as it is.

    Raises:
        UserError: the file is missing or broken, holds something else, or was made for another base.
    """
    tensors, _ = load_tensors(path)
    words = {name: torch.atleast_2d(rows).float() for name, rows in tensors.items() if FORM.fullmatch(name)}
    names = matrix_names(base.unet)
    if not any(name.endswith(tuple(MATRICES.values())) for name in tensors):
        raise UserError(f"{path}: holds no matrices of Custom Diffusion; give learned words as --words")
    unknown = [name for name, tensor in tensors.items() if len(tensor) and name not in {*words, *names.values()}]
    if unknown:
        raise UserError(f"{path}: has {unknown[0]}, of which the base has no such matrix; name its base")
    for name, stored in names.items():
        old, new = base.unet.get_parameter(name), tensors.get(stored)
        if new is None or new.shape != old.shape:
            found = "is missing" if new is None else f"is {tuple(new.shape)}, the base's {tuple(old.shape)}"
            raise UserError(f"{path}: {stored} {found}; name the base that it was made with")
    matrices = {name: tensors[stored] for name, stored in names.items()}
    return add_words(replace(base, unet=with_matrices(base.unet, matrices)), words)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UserError: it cannot be read, or has none.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable text file ({error}); name one with a prompt a line") from None
    if not any(lines):
        raise UserError(f"{path}: holds no prompts; write one a line")
    return [line for line in lines if line]


def class_prompts(args) -> list[str]:
    """What the pictures of the class are of, one prompt each: circles of named colours for the miniature.

    Raises:
        UserError: another base, and no file of prompts.
    """
    if args.class_prompts:
        prompts = read_prompts(args.class_prompts)
        return [prompts[k % len(prompts)] for k in range(args.class_images)]
    if args.base != BASE:
        raise UserError("--class-prompts: name a file with sentences of the class, or give --class-share 0")
    return [scene.prompt for scene in random_scenes(args.class_images, SCENE_SIZE, args.seed, (1, 2), held_out=False)]


def class_pictures(base: Base, prompts: Sequence[str], seed: int, guidance_scale: float, path: Path) -> Tensor:
    """Pictures that the base draws of the class: read from `path` if they are these, else drawn, and written there.

    Args:
        base: as it was before.
        prompts: one a picture.
        seed: of their noise.
        guidance_scale: to draw with.
        path: a safetensors file.

    Returns:
        uint8 (N, 3, size, size).
    """
    about = {"prompts": list(prompts), "seed": seed, "guidance_scale": guidance_scale}
    if path.exists() and load_about(path) == about:
        return load_tensors(path)[0]["images"]
    keys = [(seed, 9, k) for k in range(len(prompts))]
    images = draw_prompts(base, prompts, keys, CLASS_STEPS, guidance_scale)
    save_tensors(path, {"images": images}, about)
    return images


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="custom_diffusion.py", description=__doc__)
    add_concept_arguments(parser)
    files = parser.add_argument_group("run")
    files.add_argument("--out", type=Path, default=ROOT / "runs" / "p3_custom", help="folder of the run")
    files.add_argument("--show", nargs="+", default=[], metavar="TEXT", help="more prompts to draw meanwhile")
    prior = parser.add_argument_group("prior preservation")
    prior.add_argument("--class-share", type=float, default=0.75, help="part of a batch that are the class's pictures")
    prior.add_argument("--class-images", type=int, default=200, help="how many the base draws, once")
    prior.add_argument(
        "--class-prompts", type=Path, metavar="FILE", help="a prompt a line (default: circles, of the shipped base)"
    )
    add_training_arguments(parser, **DEFAULTS)
    return parser.parse_args(argv)


def main(args) -> Path:
    """Learn the concepts; returns the path of what differs from the base, `OUT/custom.safetensors`.

    Raises:
        UserError: bad arguments, pictures or base, a loss that is not finite, or a full disk.
    """
    options = training_options(args)
    if not 0 <= args.class_share < 1:
        raise UserError(f"--class-share {args.class_share}: must be at least 0 and below 1")
    if args.class_images < 1:
        raise UserError(f"--class-images {args.class_images}: must be at least 1")
    base = load_base(args.base, pick_device(options.device), cache=args.cache_dir)
    of_class = min(round(options.batch_size * args.class_share), options.batch_size - 1)
    prompts = class_prompts(args) if of_class else []
    concepts = read_concepts(args, base, options.seed)
    extended = concepts.base
    shown = shown_prompts(concepts) + [prompt for prompt in args.show for _ in range(SHOWN)]
    check_prompts(extended.tokenizer, shown + prompts)
    kinds = [concepts.examples]
    if of_class:
        images = class_pictures(base, prompts, options.seed, args.guidance_scale, args.out / "class.safetensors")
        told = Told(images, [[prompt] for prompt in prompts])
        kinds.append(encode(extended, [told], 1, 1.0, False, options.seed))
    counts = [options.batch_size - of_class, of_class]
    batches = ExampleBatches(kinds, counts, base.schedule.T, options.seed)
    matrices = {name: base.unet.get_parameter(name).detach().float() for name in matrix_names(base.unet)}

    def sample(learned: nn.Module) -> Tensor:
        keys = [(options.seed, k) for k in range(len(shown))]
        changed = replace(base, unet=with_matrices(base.unet, learned.unet_weights()))
        knowing = add_words(changed, learned.words(concepts.vectors))
        return grid(draw_prompts(knowing, shown, keys, STEPS, args.guidance_scale), columns=SHOWN)

    about = {"kind": KIND, "vectors": concepts.vectors, "schedule": asdict(base.schedule)}
    notes = notes_of(args) | {"class_share": args.class_share, "class_images": args.class_images}
    trainer = Trainer(
        Learned(concepts.rows, matrices),
        options,
        args.out,
        about,
        batches,
        lambda learned, batch: learning_loss(learned, extended, batch),
        watched(concepts.examples, extended, options.batch_size, seeded_generator(0, 3)),
        sample,
        notes,
    )
    learned = trainer.run()
    path = args.out / "custom.safetensors"
    if trainer.accelerator.is_main_process:
        save_custom(path, base, learned.words(concepts.vectors), learned.unet_weights(), trainer.facts())
        say(f"{path}: {', '.join(concepts.vectors)} and {len(matrices)} matrices")
    trainer.accelerator.end_training()
    return path


if __name__ == "__main__":
    run(main, parse_arguments())
