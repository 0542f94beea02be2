"""Sampling against diffusers' `StableDiffusionControlNetPipeline`, and the files that a grader reads."""

import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from PIL import Image

from common.sampling import ImageNoise
from latent_diffusion.base import load_base
from latent_diffusion.pairs import read_hints, read_pairs
from p3_controlnet import sample
from p3_controlnet.model import ControlNet
from p3_controlnet.sampler import HintOptions, HintSampler


@pytest.fixture
def draw(pipeline_folder, controlnet_folder, hint_folder, tmp_path):
    """A function that runs sample.py for three steps in fp32 and returns the pixels it wrote, by file name."""

    def run(*flags, out="out", table="prompt.json") -> dict[str, np.ndarray]:
        arguments = [hint_folder / table, hint_folder / "source", tmp_path / out, pipeline_folder]
        arguments += ["--controlnet", controlnet_folder, "--steps", 3, "--precision", "fp32", *flags]
        files = sample.main(sample.parse_arguments([str(argument) for argument in arguments]))
        written = sorted(path for path in (tmp_path / out).rglob("*") if path.is_file())
        assert written == sorted(files)
        return {str(path.relative_to(tmp_path / out)): np.asarray(Image.open(path)) for path in files}

    return run


def items_of(data, size=64):
    pairs = read_pairs(data / "prompt.json")
    return list(zip(pairs, read_hints(pairs, data / "source", size)))


def by_diffusers(pipeline_folder, controlnet_folder, items, options, count):
    """Latents and pixels of diffusers' pipeline from the same noise."""
    theirs = [ControlNetModel.from_pretrained(controlnet_folder) for _ in range(count)]
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        pipeline_folder, controlnet=theirs if count > 1 else theirs[0], safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    steps = {"timestep_spacing": options.timestep_spacing, "set_alpha_to_one": options.final_alpha == "one"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **steps)
    noise = ImageNoise([(options.seed, zlib.crc32(pair.target.encode())) for pair, _ in items])
    hints = torch.stack([hint for _, hint in items])
    side = hints.shape[-1] // 8
    latents = pipeline(
        prompt=[pair.prompt for pair, _ in items],
        image=[hints / 255] * count if count > 1 else hints / 255,
        num_inference_steps=options.steps,
        guidance_scale=options.scale,
        latents=noise.draw((4, side, side)),
        controlnet_conditioning_scale=list(options.control_scale) if count > 1 else options.control_scale[0],
        guess_mode=options.guess_mode,
        output_type="latent",
    ).images
    with torch.no_grad():
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return latents, ((images / 2 + 0.5).clamp(0, 1) * 255).round()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"guidance_scale": 1.0}, 1),
        ({"control_scale": (0.6,), "seed": 9}, 1),
        ({"control_scale": (0.0,)}, 1),
        ({"guess_mode": True, "guidance_scale": 3.0}, 1),
        ({"guess_mode": True, "guidance_scale": 1.0}, 1),
        ({"control_scale": (0.5, 0.8)}, 2),
        ({"size": 96, "patch_size": 96}, 1),
        ({"timestep_spacing": "leading", "final_alpha": "first", "steps": 5}, 1),
    ],
)
def test_pictures_are_those_of_diffusers(pipeline_folder, controlnet_folder, hint_folder, options, count):
    controlnets = [ControlNet.load(controlnet_folder)[0] for _ in range(count)]
    sampler, options = HintSampler(load_base(pipeline_folder), controlnets), HintOptions(**{"steps": 4} | options)
    items = items_of(hint_folder, sampler.sides(options)[0])
    latents, pixels = by_diffusers(pipeline_folder, controlnet_folder, items, options, count)
    ours = torch.stack([image for _, image in sampler.images(items, options)])
    assert ours.float().std() > 10  # pictures, not a flat gray in which differences drown
    assert (ours - pixels).abs().max() <= 1
    *_, last = sampler.walk(items, options)
    assert (last.xt - latents).abs().max() < 1e-4


def test_a_picture_depends_on_the_seed_and_its_own_line_alone(hint_folder, draw):
    together = draw()
    in_twos = draw("--batch-size", 2)
    lines = (hint_folder / "prompt.json").read_text().splitlines()
    (hint_folder / "part.json").write_text("\n".join([lines[3], lines[1]]))
    part = draw(out="part", table="part.json")
    assert list(part) == ["3.png", "1.png"]
    for name, pixels in [*in_twos.items(), *part.items()]:
        assert np.abs(pixels.astype(int) - together[name]).max() <= 1
    other, solver = draw("--seed", 1), draw("--sampler", "dpm-solver++")
    assert all(np.abs(other[name].astype(int) - together[name]).max() > 20 for name in together)
    assert all(not np.array_equal(solver[name], together[name]) for name in together)


def test_a_strength_for_every_residual(draw):
    whole, each = draw("--control-scale", 0.5), draw("--control-scales", *[0.5] * 7)
    middle = draw("--control-scales", *[0] * 6, 0.5)
    assert all(np.array_equal(whole[name], each[name]) for name in whole)
    assert all(not np.array_equal(whole[name], middle[name]) for name in whole)


def test_a_table_of_training_and_a_target_in_a_folder(hint_folder, draw, tmp_path):
    rows = [json.loads(line) for line in (hint_folder / "prompt.json").read_text().splitlines()]
    (hint_folder / "deep.json").write_text(json.dumps(rows[1] | {"source": "source/1.png", "target": "target/a/1.png"}))
    (tmp_path / "out" / "target" / "a").mkdir(parents=True)
    (tmp_path / "out" / "target" / "a" / "1.png").write_bytes(b"an earlier picture")
    assert draw(table="deep.json")["target/a/1.png"].shape == (64, 64, 3)


def test_larger_pictures_go_patch_by_patch(draw):
    sides = ["--patch-size", 96], [], ["--patch-size", 64, "--patch-stride", 32]
    whole, patches, same = (draw("--size", 96, "--steps", 1, *side)["0.png"].astype(int) for side in sides)
    assert whole.shape == (96, 96, 3)
    assert np.abs(whole - patches).max() > 3
    assert np.array_equal(same, patches)


def test_networks_that_overflow_in_half_precision_draw_in_fp32(pipeline_folder, controlnet_folder, hint_folder, capsys):
    """Weights that fit fp16 and sums that do not; the group norms after them make them small again."""
    pictures = []
    for dtype in (torch.float32, torch.float16):
        base = load_base(pipeline_folder, dtype=dtype)
        base.unet.mid_block.resnets[0].conv1.weight *= 5e4
        sampler = HintSampler(base, [ControlNet.load(controlnet_folder)[0]])
        drawn = sampler.images(items_of(hint_folder), HintOptions(steps=2, batch_size=2))
        pictures.append(torch.stack([image for _, image in drawn]).float())
        parts = base.unet, base.text_encoder, base.vae, *sampler.controlnets
        assert {part.dtype for part in parts} == {torch.float32}
    assert capsys.readouterr().err.count("warning: half precision overflows; drawing in fp32 from here on\n") == 1
    assert (pictures[0] - pictures[1]).abs().mean() < 4


def test_without_arguments_it_draws_what_comes_with_the_project(
    monkeypatch, pipeline_folder, controlnet_folder, hint_folder, tmp_path
):
    shutil.copytree(hint_folder / "source", hint_folder, dirs_exist_ok=True)
    places = {"BASE": pipeline_folder, "CONTROLNET": controlnet_folder, "EXAMPLES": hint_folder}
    for name, place in (places | {"OUTPUT": tmp_path / "out"}).items():
        monkeypatch.setattr(sample, name, place)
    files = sample.main(sample.parse_arguments(["--steps", "1"]))
    assert files == [tmp_path / "out" / f"{k}.png" for k in range(5)]
    assert all(Image.open(path).size == (64, 64) for path in files)
