"""The miniature's three stages, with still smaller parts: what each leaves, resume, bad input."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from common.data import to_unit_range
from common.images import read_image
from latent_diffusion.base import load_base
from latent_diffusion.miniature import models, train
from p3_controlnet import fill50k
from tests import programs
from tests.training import killed_at, metrics, same_files

SMALL = [
    *("--batch-size", "4", "--steps", "4", "--warmup", "2", "--lr", "2e-3", "--precision", "fp32", "--device", "cpu"),
    *("--log-every", "1", "--save-every", "2", "--validate-every", "2", "--sample-every", "4"),
]
QUIET = ["--save-every", "1000", "--validate-every", "1000", "--sample-every", "1000"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty-four pictures, of which four are held out."""
    return programs.run(fill50k, tmp_path_factory.mktemp("circles") / "data", "--count", "44", "--size", "128").parent


@pytest.fixture(autouse=True, scope="module")
def smaller():
    """Parts of a few thousand parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "make_vae", partial(models.make_vae, (4, 4, 8, 8)))
        patch.setattr(models, "make_clip", partial(models.make_clip, width=16, layers=1))
        patch.setattr(models, "make_unet", partial(models.make_unet, (16, 32), 16))
        yield


def run(stage, data, out, *flags):
    return programs.run(train, stage, "--data", data, "--out", out, *SMALL, *flags)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """All stages, four steps each."""
    out = tmp_path_factory.mktemp("base")
    for stage in ("vae", "clip", "unet"):
        run(stage, data, out)
    return out


def test_the_stages_leave_a_pipeline_a_clip_and_their_logs(finished):
    assert {path.name for path in finished.iterdir()} == {"pipeline", "clip", "stages"}
    for stage in ("vae", "clip", "unet"):
        losses = [line["loss"] for line in metrics(finished / "stages" / stage) if "loss" in line]
        assert len(losses) == 4
        assert any("validation_loss" in line for line in metrics(finished / "stages" / stage))
    with Image.open(finished / "stages" / "vae" / "samples_00000004.png") as picture:
        assert picture.size == (8 * 130 + 2, 130 + 2)  # the four held-out pictures, and what comes back of them


def test_diffusers_runs_the_pipeline(finished):
    pipeline = StableDiffusionPipeline.from_pretrained(finished / "pipeline", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert {model.dtype for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    image = pipeline("red circle with blue background", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 128, 128, 3)


def test_the_clip_folder_holds_the_pipelines_text_encoder(finished):
    clip, information = CLIPModel.from_pretrained(finished / "clip", local_files_only=True, output_loading_info=True)
    assert not information["missing_keys"]
    assert clip.dtype == torch.float32
    base = load_base(finished / "pipeline")
    theirs, ours = clip.text_model.state_dict(), base.text_encoder.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    prompt = "red circle with blue background"
    processor = CLIPProcessor.from_pretrained(finished / "clip", local_files_only=True)
    inputs = processor(text=[prompt], images=Image.new("RGB", (128, 128), (255, 0, 51)), return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == base.tokenizer(prompt).input_ids
    assert inputs["pixel_values"].shape == (1, 3, 128, 128)
    wanted = torch.tensor([1.0, -1.0, -0.6])
    assert (inputs["pixel_values"].mean(dim=(0, 2, 3)) - wanted).abs().max() <= 1e-5
    assert -1 <= (clip(**inputs).logits_per_image / clip.logit_scale.exp()).item() <= 1


def test_the_scaling_factor_makes_latents_of_unit_variance(finished, data):
    (_, images), _ = train.read_pictures(data)
    latents = load_base(finished / "pipeline").encode_images(to_unit_range(images))
    assert latents.std().item() == pytest.approx(1, abs=0.01)


def test_resumed_stages_take_the_same_steps(finished, data, tmp_path):
    """In every bit; the kill comes a step after the last save."""
    for stage in ("vae", "clip", "unet"):
        with killed_at(3):
            run(stage, data, tmp_path)
        run(stage, data, tmp_path)
        one, other = (out / "stages" / stage for out in (tmp_path, finished))
        assert metrics(one) == metrics(other)
        assert same_files(one / "state_00000004.safetensors", other / "state_00000004.safetensors")
    for name in ("vae/diffusion_pytorch_model", "text_encoder/model", "unet/diffusion_pytorch_model"):
        file = f"pipeline/{name}.safetensors"
        assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()


def test_an_earlier_part_may_be_trained_again(finished, data, tmp_path):
    """The others stay."""
    out = shutil.copytree(finished, tmp_path / "base")
    shutil.rmtree(out / "stages" / "vae")
    run("vae", data, out, "--seed", "1")
    assert (out / "pipeline" / "model_index.json").exists()
    shutil.rmtree(out / "pipeline" / "unet")
    run("unet", data, out, "--steps", "5")
    load_base(out / "pipeline")


def test_clip_goes_on_from_a_folder(finished, data, tmp_path):
    run("clip", data, tmp_path, "--init", str(finished / "clip"), "--steps", "1", "--lr", "1e-9")
    before, after = (load_file(out / "clip" / "model.safetensors") for out in (finished, tmp_path))
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-3
    assert (tmp_path / "clip/tokenizer.json").read_bytes() == (finished / "clip/tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("stage", "batch_size", "measured"),
    [("vae", 4, "ciede2000"), ("clip", 8, "own_picture_first"), ("unet", 8, "validation_loss")],
)
def test_every_stage_learns(finished, data, tmp_path, stage, batch_size, measured):
    shutil.copytree(finished / "pipeline", tmp_path / "pipeline")
    run(stage, data, tmp_path, "--steps", "40", "--batch-size", str(batch_size), *QUIET)
    lines = metrics(tmp_path / "stages" / stage)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert [line["step"] for line in lines if measured in line] == [40]


def test_every_eleventh_picture_is_held_out(data):
    learned, held = train.read_pictures(data)
    prompts = [json.loads(line)["prompt"] for line in (data / "prompt.json").read_text().splitlines()]
    assert held.prompts == [prompts[k] for k in (10, 21, 32, 43)]
    assert learned.prompts == [prompts[k] for k in range(44) if k not in (10, 21, 32, 43)]
    assert (held.images[0].permute(1, 2, 0).numpy() == read_image(data / "target" / "10.png", None)).all()


@pytest.mark.parametrize(
    ("stage", "flags", "complaint"),
    [
        ("unet", [], "{tmp}/out/pipeline/vae: no such folder; a base has"),
        ("vae", ["--data", "{tmp}/absent"], "{tmp}/absent/prompt.json: no such file"),
        ("clip", ["--data", "{tmp}/few"], "{tmp}/few/prompt.json: lists 3 pictures; give at least 11"),
        ("vae", ["--data", "{tmp}/broken"], "{tmp}/broken/prompt.json line 12: {tmp}/broken/target/11.png: no such"),
        ("vae", ["--kl-weight", "-1"], "--kl-weight -1.0: must be at least 0"),
        ("unet", ["--prompt-drop", "1.5"], "--prompt-drop 1.5: must be between 0 and 1"),
        ("unet", ["--min-snr-gamma", "nan"], "--min-snr-gamma nan: must be at least 0"),
        ("clip", ["--out", "{tmp}/few/prompt.json"], "{tmp}/few/prompt.json"),
    ],
)
def test_bad_input_is_refused_in_one_line(data, tmp_path, refusal, stage, flags, complaint):
    lines = (data / "prompt.json").read_text().splitlines(keepends=True)
    for name, count in (("few", 3), ("broken", 12)):
        shutil.copytree(data, tmp_path / name)
        (tmp_path / name / "prompt.json").write_text("".join(lines[:count]))
    (tmp_path / "broken" / "target" / "11.png").unlink()
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    line = refusal(lambda flags: run(stage, data, tmp_path / "out", *flags), flags)
    assert line.startswith(complaint.format(tmp=tmp_path))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.safetensors"))
