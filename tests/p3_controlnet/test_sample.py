"""Sampling against diffusers' `StableDiffusionControlNetPipeline`, the files that a grader reads, and bad input."""

import json
import zlib
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline

from common.sampling import ImageNoise
from latent_diffusion.base import load_base
from latent_diffusion.pairs import read_hints, read_pairs, readable_pairs
from p3_controlnet import sample
from p3_controlnet.model import ControlNet, ControlNetConfig
from p3_controlnet.sampler import HintOptions, HintSampler
from tests.programs import parse, read


@pytest.fixture
def arguments(pipeline_folder, controlnet_folder, hint_folder, tmp_path):
    """A function that makes sample.py's arguments for three steps in fp32, with further flags, perhaps wrong ones."""

    def make(*flags, out="out", table="prompt.json", base=pipeline_folder, controlnet=controlnet_folder):
        places = [hint_folder / table, hint_folder / "source", tmp_path / out, base, "--controlnet", controlnet]
        return parse(sample, *places, "--steps", 3, "--precision", "fp32", *flags)

    return make


@pytest.fixture
def draw(arguments):
    """A function that runs sample.py and returns the pixels it wrote, by file name."""

    def run(*flags, **places) -> dict[str, np.ndarray]:
        out = (args := arguments(*flags, **places)).out
        files = sample.main(args)
        assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(files)
        return {str(path.relative_to(out)): read(path) for path in files}

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
        assert np.abs(pixels - together[name]).max() <= 1
    other, solver = draw("--seed", 1), draw("--sampler", "dpm-solver++")
    assert all(np.abs(other[name] - together[name]).max() > 20 for name in together)
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
    whole, patches, same = (draw("--size", 96, "--steps", 1, *side)["0.png"] for side in sides)
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


def test_without_arguments_it_takes_what_comes_with_the_project():
    args = sample.parse_arguments([])
    pairs = read_pairs(args.table, distinct_targets=True)
    assert len(readable_pairs(pairs, args.source, keep_going=False)) == 22
    assert (args.base, sample.default_controlnet(args.base)) == (sample.BASE, sample.CONTROLNET)


@pytest.fixture
def refused(arguments, refusal, tmp_path):
    """A function that runs sample.py, which must say these parts on one line and write nothing."""

    def check(*parts, flags=(), **changes):
        line, out = refusal(sample.main, arguments(*flags, **changes)), tmp_path / "out"
        assert not [part for part in parts if part not in line]
        assert not out.is_dir() or not list(out.iterdir())

    return check


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{", ["line 3", "not JSON"]),
        ('{"source": "1.png", "target": "0.png", "prompt": ""}', ["line 3", "line 1", "0.png"]),
        ('{"source": "broken.png", "target": "9.png", "prompt": ""}', ["line 3", "broken.png"]),
    ],
)
def test_one_bad_line_stops_everything_unless_told_to_go_on(draw, refused, hint_folder, line, parts):
    (hint_folder / "source" / "broken.png").write_bytes(b"no image")
    good = (hint_folder / "prompt.json").read_text().splitlines()
    (hint_folder / "bad.json").write_text("\n".join([*good[:2], line, *good[2:]]))
    refused("bad.json", *parts, table="bad.json")
    skipping = draw("--keep-going", table="bad.json")
    whole = draw()
    assert list(skipping) == list(whole)
    assert all(np.array_equal(skipping[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--steps", "1001"], "--steps 1001: "),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--guidance-scale", "nan"], "--guidance-scale nan: must be at least 0"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--size", "60"], "--size 60: must be divisible by 8"),
        (["--size", "0"], "--size 0"),
        (["--patch-size", "12"], "--patch-size 12"),
        (["--patch-stride", "0"], "--patch-stride 0"),
        (["--patch-size", "32", "--patch-stride", "40"], "--patch-stride 40"),
        (["--control-scale", "1", "2"], "--control-scale: 2 numbers for 1"),
        (["--control-scale", "inf"], "--control-scale inf"),
        (["--control-scales", "1", "2"], "--control-scales: 2 numbers; this ControlNet has 7"),
    ],
)
def test_flags_out_of_range(refused, flags, complaint):
    refused(complaint, flags=flags)


def test_bad_weights(refused, tmp_path, unet, controlnet, pipeline_folder):
    refused("nowhere", controlnet=tmp_path / "nowhere")
    refused("has no config.json, but", "name a whole folder in diffusers' layout", controlnet=pipeline_folder)
    ControlNet.from_unet(unet, (4, 4, 4, 4, 4)).save(tmp_path / "coarser", {})
    refused("coarser", "16 pixels a latent, the base has 8", controlnet=tmp_path / "coarser")
    ControlNet(ControlNetConfig(**asdict(controlnet.config) | {"cross_attention_dim": 24})).save(tmp_path / "other", {})
    refused("other", "cross_attention_dim 24, not 16", controlnet=tmp_path / "other")


def test_places_that_cannot_be_read_or_written(refused, full_disk, tmp_path):
    with full_disk(1000):
        refused(str(tmp_path / "out"))
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("in the way")
    refused(f"{tmp_path / 'out'}: is a file")
    assert (tmp_path / "out").read_text() == "in the way"
