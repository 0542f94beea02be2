"""Training a small ControlNet through its own script: what moves, what stays, resume, and bad input."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_tensors
from common.cli import options_from
from common.runtime import seeded_generator
from common.training_options import TrainingOptions, training_options
from latent_diffusion.base import load_base
from latent_diffusion.pairs import read_hints, read_pairs
from p3_controlnet import cache, train
from p3_controlnet.cache import PairBatches, encode_pairs
from p3_controlnet.model import ControlNet
from p3_controlnet.watch import Watch
from tests.training import killed_at, metrics, same_states, spied_on, touched

SMALL = [
    *("--hint-channels", "4", "6", "8", "10", "--batch-size", "4", "--steps", "6", "--warmup", "1", "--lr", "1e-2"),
    *("--precision", "fp32", "--device", "cpu", "--log-every", "1", "--save-every", "3", "--validate-every", "3"),
    *("--sample-every", "6"),
]


@pytest.fixture(scope="module")
def call(circles, pipeline_folder):
    """A function that trains into a folder; validates on few pairs."""

    def run(out, *flags):
        arguments = ["--data", str(circles), "--base", str(pipeline_folder), "--out", str(out), *SMALL, *flags]
        args = train.parse_arguments(arguments)
        config = options_from(args, train.ControlNetTraining)
        return train.train(replace(config, validated=10), training_options(args))

    return run


@pytest.fixture(scope="module")
def finished(call, tmp_path_factory):
    """An undisturbed run of six steps."""
    return call(tmp_path_factory.mktemp("finished")).parent


def test_a_run_leaves_a_controlnet_and_tells_what_moves(finished, pipeline_folder):
    controlnet, about = ControlNet.load(finished / "controlnet")
    assert (about["step"], about["guidance_scale"], about["training"]["prompt_drop"]) == (6, 2.0, 0.1)
    untrained = ControlNet.from_unet(load_base(pipeline_folder).unet, (4, 6, 8, 10))
    moved = [name for name, p in controlnet.named_parameters() if not torch.equal(p, untrained.get_parameter(name))]
    assert len(moved) > 0.9 * len(list(controlnet.parameters()))
    watched = [line for line in metrics(finished) if "condition_sensitivity" in line]
    assert [line["step"] for line in watched] == [3, 6]
    assert all(line["condition_sensitivity"] > 0 and 0 <= line["hint_iou"] <= 1 for line in watched)
    with Image.open(finished / "samples_00000006.png") as picture:
        assert picture.size == (8 * 66 + 2, 3 * 66 + 2)


def test_only_the_controlnet_is_trained_and_the_base_stays_as_it_is(call, pipeline_folder, tmp_path, monkeypatch):
    seen = spied_on(monkeypatch, train)
    call(tmp_path / "run", "--steps", "2")
    assert touched(seen.base, pipeline_folder) == []
    optimized = {id(p) for group in seen.trainer.state.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in seen.trainer.model.parameters()}


def test_a_killed_run_ends_like_an_undisturbed_one(call, finished, tmp_path):
    with killed_at(4):
        call(tmp_path / "run")
    call(tmp_path / "run")
    assert same_states(tmp_path / "run", finished)


def test_training_goes_on_from_an_earlier_controlnet(call, finished, tmp_path):
    folder = call(tmp_path / "run", "--steps", "1", "--lr", "1e-9", "--init", str(finished / "controlnet"))
    before, after = (ControlNet.load(path)[0].state_dict() for path in (finished / "controlnet", folder))
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-3


def test_checkpointed_and_accumulated_it_takes_the_same_steps(call, finished, tmp_path):
    call(tmp_path / "run", "--gradient-checkpointing", "--accumulate", "2")
    for name in ("loss", "validation_loss"):
        ours, theirs = ([line[name] for line in metrics(out) if name in line] for out in (tmp_path / "run", finished))
        assert ours == pytest.approx(theirs, rel=1e-3), name


def test_a_dry_run_takes_the_very_step_of_a_run_and_writes_nothing(call, tmp_path, monkeypatch, capsys):
    """Of a run whose batch has the same pairs."""
    seen = spied_on(monkeypatch, train)
    monkeypatch.setattr(cache, "shuffled_indices", lambda count, seed, start, length: torch.arange(length) % count)
    figures = call(tmp_path / "run", "--dry-run", "--accumulate", "2", "--gradient-checkpointing")
    assert list(tmp_path.iterdir()) == []
    assert json.loads(capsys.readouterr().out) == figures
    assert (figures["batch_size"], figures["accumulate"], figures["precision"]) == (4, 2, "no")
    assert 0 < figures["peak_memory_gb"] < 50
    call(tmp_path / "dry", "--dry-run")
    dry = seen.trainer.model.state_dict()
    call(tmp_path / "run", "--steps", "1")
    assert all(torch.equal(tensor, dry[name]) for name, tensor in seen.trainer.model.state_dict().items())


def test_on_a_gpu_the_frozen_weights_take_the_precision_of_the_training(call, tmp_path, monkeypatch):
    options = TrainingOptions(precision="bf16", device="cpu")
    assert train.frozen_dtype(options) == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
        assert train.frozen_dtype(options) == torch.bfloat16
    monkeypatch.setattr(train, "frozen_dtype", lambda options: torch.bfloat16)
    seen = spied_on(monkeypatch, train)
    call(tmp_path / "run", "--precision", "bf16", "--steps", "2", "--latents", str(tmp_path / "latents"))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "latents"}
    assert {seen.base.unet.dtype, seen.base.vae.dtype} == {torch.bfloat16}
    state, _ = load_tensors(tmp_path / "run" / "state_00000002.safetensors")
    assert {tensor.dtype for name, tensor in state.items() if name.startswith("model.")} == {torch.float32}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--prompt-drop", "2"], "--prompt-drop 2.0: must be between 0 and 1"),
        (["--min-snr-gamma", "-1"], "--min-snr-gamma -1.0: must be at least 0"),
        (["--hint-channels", "4", "8"], "--hint-channels: 2 widths fold 2 pixels, not 8"),
        (["--image-size", "60"], "--image-size 60: must be divisible by 8"),
        (["--data", "{tmp}/absent"], "{tmp}/absent/prompt.json: no such file"),
        (["--init", "{tmp}/absent"], "{tmp}/absent: no such"),
        (["--data", "{tmp}/data"], "{tmp}/data/prompt.json line 7: {tmp}/data/source/6.png: no such image"),
    ],
)
def test_bad_arguments_are_one_clear_line(call, circles, tmp_path, refusal, flags, complaint):
    shutil.copytree(circles, tmp_path / "data")
    (tmp_path / "data" / "source" / "6.png").unlink()
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    assert complaint.format(tmp=tmp_path) in refusal(lambda flags: call(tmp_path / "run", *flags), flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("at_once", [3, 4])
@torch.no_grad()
def test_the_watch_sees_control_where_there_is_some(circles, pipeline_folder, controlnet_folder, at_once):
    base, pairs = load_base(pipeline_folder), read_pairs(circles / "prompt.json")
    encoded, hints = encode_pairs(base, pairs, circles, 64), read_hints(pairs, circles, 64)
    batches = PairBatches(encoded, hints.__getitem__, torch.arange(44), base.schedule, 4, 0.0, seed=0)
    watch, whole = (
        Watch(base, batches(0, seeded_generator(0, 3)), encoded.null_context, 2.0, count) for count in (at_once, 4)
    )
    controlnet = ControlNet.load(controlnet_folder)[0]
    assert (watch.images(controlnet).int() - whole.images(controlnet).int()).abs().max() <= 1
    assert watch.sensitivity(ControlNet.from_unet(base.unet, (4, 6, 8, 10))) == 0
    assert watch.sensitivity(controlnet) > 1e-3
    # Targets in place of what is drawn: every disc lies where its hint has it.
    places = {hint.numpy().tobytes(): pair.target for hint, pair in zip(hints, pairs)}
    targets = [np.asarray(Image.open(circles / places[hint.numpy().tobytes()])) for hint in watch.batch["hint"]]
    watch.images = lambda controlnet: torch.from_numpy(np.stack(targets)).permute(0, 3, 1, 2)
    assert watch.measure(controlnet)["hint_iou"] > 0.95
