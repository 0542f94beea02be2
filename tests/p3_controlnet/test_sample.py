"""Sampling against diffusers' `StableDiffusionControlNetPipeline`, and the files that a grader reads."""

import json
import zlib

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image

from common.cli import UserError
from common.sampling import ImageNoise
from common.sampling import draw as draw_latents
from latent_diffusion.base import Base, load_base
from latent_diffusion.drawing import SAMPLERS
from latent_diffusion.pairs import read_hints, read_pairs
from p3_controlnet import sample
from p3_controlnet.model import ControlNet, HintEncoder
from p3_controlnet.sampler import HintSampler, SamplingOptions
from p3_controlnet.unet import decode


@pytest.fixture
def draw(pipeline_folder, controlnet_folder):
    """A function that runs sample.py for three steps in fp32 and returns the pixels it wrote, by file name."""

    def run(data, out, *flags, table="prompt.json") -> dict[str, np.ndarray]:
        arguments = [data / table, data / "source", out, pipeline_folder, "--controlnet", controlnet_folder]
        arguments += ["--steps", 3, "--precision", "fp32", *flags]
        files = sample.main(sample.parse_arguments([str(argument) for argument in arguments]))
        written = sorted(path for path in out.rglob("*") if path.is_file())
        assert written == sorted(files)
        return {str(path.relative_to(out)): np.asarray(Image.open(path)) for path in files}

    return run


def make_sampler(pipeline_folder, controlnet_folder, count=1, **options):
    controlnets = [ControlNet.load(controlnet_folder)[0] for _ in range(count)]
    return HintSampler(load_base(pipeline_folder), controlnets, SamplingOptions(**{"steps": 4, **options}))


def by_diffusers(pipeline_folder, controlnet_folder, pairs, hints, options, count=1):
    """Latents and pixels of diffusers' pipeline from the same noise."""
    theirs = [ControlNetModel.from_pretrained(controlnet_folder) for _ in range(count)]
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        pipeline_folder, controlnet=theirs if count > 1 else theirs[0], safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = ImageNoise([(options.seed, zlib.crc32(pair.target.encode())) for pair in pairs])
    side = hints.shape[-1] // 8
    scale = list(options.control_scale) if count > 1 else options.control_scale[0]
    latents = pipeline(
        prompt=[pair.prompt for pair in pairs],
        image=[hints / 255] * count if count > 1 else hints / 255,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        latents=noise.draw((4, side, side)),
        controlnet_conditioning_scale=scale,
        guess_mode=options.guess_mode,
        output_type="latent",
    ).images
    with torch.no_grad():
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return latents, ((images / 2 + 0.5).clamp(0, 1) * 255).round()


def largest_differences(sampler, pipeline_folder, controlnet_folder, data, size=64):
    """The largest absolute differences from diffusers' pipeline, of latents and of pixels (levels of 255)."""
    pairs = read_pairs(data / "prompt.json")
    hints = read_hints(pairs, data / "source", size)
    count = len(sampler.unet.controlnets)
    latents, pixels = by_diffusers(pipeline_folder, controlnet_folder, pairs, hints, sampler.options, count)
    ours = torch.stack([image for _, image in sampler.images(pairs, hints, batch_size=len(pairs))])
    assert ours.float().std() > 10  # pictures, not a flat gray in which differences drown
    with torch.no_grad():
        drawn = draw_latents(**sampler.steps(pairs, hints))
    return (drawn - latents).abs().max(), (ours - pixels).abs().max()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"guidance_scale": 1.0}, 1),
        ({"control_scale": (0.6,), "seed": 9}, 1),
        ({"guess_mode": True, "guidance_scale": 3.0}, 1),
        ({"guess_mode": True, "guidance_scale": 1.0}, 1),
        ({"control_scale": (0.5, 0.8)}, 2),
    ],
    ids=str,
)
def test_pictures_are_those_of_diffusers(pipeline_folder, controlnet_folder, hint_folder, options, count):
    sampler = make_sampler(pipeline_folder, controlnet_folder, count, **options)
    latents, pixels = largest_differences(sampler, pipeline_folder, controlnet_folder, hint_folder)
    assert latents < 1e-4
    assert pixels <= 1


@pytest.mark.parametrize("flags", [["--guidance-scale", "3"], ["--guidance-scale", "1"], ["--guess-mode"]], ids=str)
def test_encodes_once_a_picture_and_never_in_a_step(
    pipeline_folder, controlnet_folder, hint_folder, draw, tmp_path, monkeypatch, flags
):
    rows = {"hints": 0, "prompts": 0, "steps": 0}

    def count(owner, name, key):
        whole = getattr(owner, name)

        def counted(self, first, *args, **kwargs):
            rows[key] += len(first)
            return whole(self, first, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(HintEncoder, "forward", "hints")
    count(Base, "encode_prompts", "prompts")
    monkeypatch.setattr(
        "p3_controlnet.unet.decode", lambda *args: rows.update(steps=rows["steps"] + 1) or decode(*args)
    )
    draw(hint_folder, tmp_path / "out", "--batch-size", 3, *flags)
    # Five pictures in two batches of three steps, with the empty prompt beside those of each batch.
    assert rows == {"hints": 5, "prompts": 5 + 2, "steps": 2 * 3}


def test_without_control_it_is_the_base(pipeline_folder, hint_folder, draw, tmp_path):
    drawn = draw(hint_folder, tmp_path / "out", "--control-scale", 0)
    pairs = read_pairs(hint_folder / "prompt.json")
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = ImageNoise([(0, zlib.crc32(pair.target.encode())) for pair in pairs])
    theirs = pipeline(
        [pair.prompt for pair in pairs], num_inference_steps=3, latents=noise.draw((4, 8, 8)), output_type="np"
    ).images
    for name, image in zip(drawn, theirs):
        assert np.abs(drawn[name] - image * 255).max() <= 1
    controlled = draw(hint_folder, tmp_path / "controlled")
    assert all(np.abs(controlled[name].astype(int) - drawn[name]).max() > 5 for name in drawn)


def test_a_strength_for_every_residual(hint_folder, draw, tmp_path):
    whole = draw(hint_folder, tmp_path / "a", "--control-scale", 0.5)
    stages = draw(hint_folder, tmp_path / "b", "--control-scales", *[0.5] * 7)
    middle_only = draw(hint_folder, tmp_path / "c", "--control-scales", *[0] * 6, 0.5)
    assert all(np.array_equal(whole[name], stages[name]) for name in whole)
    assert all(not np.array_equal(whole[name], middle_only[name]) for name in whole)


def test_a_picture_depends_on_the_seed_and_its_own_line_alone(hint_folder, draw, tmp_path):
    together = draw(hint_folder, tmp_path / "a")
    in_twos = draw(hint_folder, tmp_path / "b", "--batch-size", 2)
    lines = (hint_folder / "prompt.json").read_text().splitlines()
    (hint_folder / "part.json").write_text("\n".join([lines[3], lines[1]]))
    part = draw(hint_folder, tmp_path / "c", table="part.json")
    assert list(part) == ["3.png", "1.png"]
    for name, pixels in [*in_twos.items(), *part.items()]:
        assert np.abs(pixels.astype(int) - together[name]).max() <= 1
    other = draw(hint_folder, tmp_path / "d", "--seed", 1)
    assert all(np.abs(other[name].astype(int) - together[name]).max() > 20 for name in together)


def use_training_names(data):
    """Rewrite the table as the course trains with it: with the hints' folder in their names."""
    rows = [json.loads(line) for line in (data / "prompt.json").read_text().splitlines()]
    lines = [json.dumps(row | {"source": f"source/{row['source']}"}) for row in rows]
    (data / "prompt.json").write_text("\n".join(lines))


def test_training_tables_and_testing_tables_give_the_same_pictures(hint_folder, draw, tmp_path):
    testing = draw(hint_folder, tmp_path / "a")
    use_training_names(hint_folder)
    training = draw(hint_folder, tmp_path / "b")
    assert training.keys() == testing.keys()
    assert all(np.array_equal(training[name], testing[name]) for name in testing)


def test_targets_may_lie_in_folders_and_an_earlier_picture_is_replaced(hint_folder, draw, tmp_path):
    line = {"source": "1.png", "target": "target/deep/0.png", "prompt": "red"}
    (hint_folder / "deep.json").write_text(json.dumps(line))
    (tmp_path / "out" / "target" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "target" / "deep" / "0.png").write_bytes(b"old")
    drawn = draw(hint_folder, tmp_path / "out", table="deep.json")
    assert drawn["target/deep/0.png"].shape == (64, 64, 3)


def test_larger_pictures_go_patch_by_patch(pipeline_folder, controlnet_folder, hint_folder, draw, tmp_path):
    sampler = make_sampler(pipeline_folder, controlnet_folder, size=96, patch_size=96)
    latents, pixels = largest_differences(sampler, pipeline_folder, controlnet_folder, hint_folder, size=96)
    assert latents < 1e-4
    assert pixels <= 1
    whole = draw(hint_folder, tmp_path / "a", "--size", 96, "--patch-size", 96, "--steps", 1)
    patches = draw(hint_folder, tmp_path / "b", "--size", 96, "--steps", 1)
    same = draw(hint_folder, tmp_path / "c", "--size", 96, "--patch-size", 64, "--patch-stride", 32, "--steps", 1)
    for name in whole:
        assert whole[name].shape == (96, 96, 3)
        assert np.abs(whole[name].astype(int) - patches[name]).max() > 3
        assert np.array_equal(same[name], patches[name])


def test_lower_precision_stays_near(hint_folder, draw, tmp_path):
    exact = draw(hint_folder, tmp_path / "a")
    near = draw(hint_folder, tmp_path / "b", "--precision", "bf16")
    errors = [np.abs(near[name].astype(int) - exact[name]).mean() for name in exact]
    assert 0 < max(errors) < 4


def test_networks_that_overflow_in_half_precision_draw_in_fp32(pipeline_folder, controlnet_folder, hint_folder, capsys):
    """Weights that fit fp16 and sums that do not; the group norms after them make them small again."""
    pairs = read_pairs(hint_folder / "prompt.json")
    hints, pictures = read_hints(pairs, hint_folder / "source", 64), {}
    for dtype in (torch.float32, torch.float16):
        base = load_base(pipeline_folder, dtype=dtype)
        base.unet.mid_block.resnets[0].conv1.weight *= 5e4
        sampler = HintSampler(base, [ControlNet.load(controlnet_folder)[0]], SamplingOptions(steps=2))
        pictures[dtype] = torch.stack([image for _, image in sampler.images(pairs, hints, batch_size=2)]).float()
        assert {part.dtype for part in (base.unet, base.text_encoder, base.vae)} == {torch.float32}
        assert len(pictures[dtype]) == len(pairs)
    err = capsys.readouterr().err
    assert (err.count("\n"), err.startswith("warning: the networks overflow in torch.float16")) == (1, True)
    assert (pictures[torch.float16] - pictures[torch.float32]).abs().mean() < 4


def test_what_is_not_finite_in_fp32_is_an_error(pipeline_folder, controlnet_folder, hint_folder):
    sampler = make_sampler(pipeline_folder, controlnet_folder)
    sampler.base.unet.conv_out.bias[0] = float("nan")
    pairs = read_pairs(hint_folder / "prompt.json")
    with pytest.raises(UserError, match=r"prompt.json line 1: drawn in fp32 it is not finite"):
        list(sampler.images(pairs, read_hints(pairs, hint_folder / "source", 64), batch_size=2))


@pytest.mark.parametrize(("fits", "sizes"), [(2, [5, 2, 2, 1]), (1, [5, 2, 1, 1, 1, 1, 1])])
def test_a_batch_that_does_not_fit_is_halved(
    pipeline_folder, controlnet_folder, hint_folder, monkeypatch, capsys, fits, sizes
):
    pairs = read_pairs(hint_folder / "prompt.json")
    hints, tried = read_hints(pairs, hint_folder / "source", 64), []
    sampler = make_sampler(pipeline_folder, controlnet_folder)
    expected = [image for _, image in sampler.images(pairs, hints, batch_size=8)]
    whole = Base.decode

    def decode(base, latents):
        tried.append(len(latents))
        if len(latents) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(base, latents)

    monkeypatch.setattr(Base, "decode", decode)
    drawn = list(sampler.images(pairs, hints, batch_size=8))
    assert tried == sizes
    assert [pair for pair, _ in drawn] == pairs
    assert all((image.int() - other.int()).abs().max() <= 1 for (_, image), other in zip(drawn, expected))
    assert capsys.readouterr().err.count("the GPU's memory is full; going on with --batch-size") == 3 - fits
    monkeypatch.setattr(Base, "decode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(UserError, match="a picture of 64x64 does not fit the GPU's memory; add --precision fp16"):
        list(sampler.images(pairs, hints, batch_size=2))


def test_both_samplers_draw(hint_folder, draw, tmp_path):
    ddim, solver = (draw(hint_folder, tmp_path / name, "--sampler", name) for name in SAMPLERS)
    assert all(not np.array_equal(ddim[name], solver[name]) for name in ddim)


def test_a_long_prompt_is_cut_with_a_warning_that_names_its_line(hint_folder, draw, tmp_path, capsys):
    """A token a letter, so that 75 letters fit and the rest does not matter."""
    rows = [{"source": "0.png", "target": "0.png", "prompt": "a " * 75 + end} for end in ("", "b c")]
    drawn = []
    for k, row in enumerate(rows):
        (hint_folder / "long.json").write_text("\n" + json.dumps(row))
        drawn.append(draw(hint_folder, tmp_path / str(k), table="long.json")["0.png"])
        warnings = capsys.readouterr().err
        assert (warnings.count("\n"), "long.json line 2: prompt" in warnings) == (k, k == 1)
    assert np.array_equal(*drawn)


def test_without_arguments_it_draws_what_comes_with_the_project(
    monkeypatch, pipeline_folder, controlnet_folder, hint_folder, tmp_path
):
    args = sample.parse_arguments([])
    root = sample.HERE.parent
    assert [str(place.relative_to(root)) for place in (args.table, args.source, args.out, args.base)] == [
        "p3_controlnet/examples/prompt.json",
        "p3_controlnet/examples",
        "outputs/p3",
        "latent_diffusion/miniature/weights/base",
    ]
    use_training_names(hint_folder)
    for name, place in {"BASE": pipeline_folder, "CONTROLNET": controlnet_folder, "EXAMPLES": hint_folder}.items():
        monkeypatch.setattr(sample, name, place)
    monkeypatch.setattr(sample, "OUTPUT", tmp_path / "out")
    files = sample.main(sample.parse_arguments(["--steps", "1"]))
    assert files == [tmp_path / "out" / f"{k}.png" for k in range(5)]
    assert all(Image.open(path).size == (64, 64) for path in files)
