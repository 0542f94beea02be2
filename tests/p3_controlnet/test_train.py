"""Training a small ControlNet through its own script: what moves, what stays, resume, and bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_tensors
from common.errors import UserError
from common.pairs import read_hints, read_pairs
from common.runtime import seeded_generator
from common.stable_diffusion.base import load_base
from common.training import Trainer
from p3_controlnet import fill50k, train
from p3_controlnet.cache import encode_pairs
from p3_controlnet.model import ControlNet

SMALL = [
    *("--hint-channels", "4", "6", "8", "10", "--batch-size", "4", "--steps", "6", "--warmup", "1", "--lr", "1e-2"),
    *("--precision", "fp32", "--device", "cpu", "--log-every", "1", "--save-every", "3", "--validate-every", "3"),
    *("--sample-every", "6"),
]


@pytest.fixture(scope="session")
def circles(tmp_path_factory):
    """Pictures of 64x64 with one circle or two; four of them are held out."""
    folder = tmp_path_factory.mktemp("circles") / "data"
    fill50k.main(fill50k.parse_arguments([str(folder), "--count", "44", "--size", "64"]))
    return folder


@pytest.fixture
def call(circles, pipeline_folder):
    """A function that trains into a folder."""

    def run(out, *flags):
        arguments = ["--data", str(circles), "--base", str(pipeline_folder), "--out", str(out), *SMALL, *flags]
        return train.main(train.parse_arguments(arguments))

    return run


@pytest.fixture(scope="session")
def finished(circles, pipeline_folder, tmp_path_factory):
    """An undisturbed run of six steps."""
    out = tmp_path_factory.mktemp("finished")
    train.main(
        train.parse_arguments(["--data", str(circles), "--base", str(pipeline_folder), "--out", str(out), *SMALL])
    )
    return out


def test_a_run_leaves_a_controlnet_and_tells_what_moves(finished, pipeline_folder):
    controlnet, about = ControlNet.load(finished / "controlnet")
    assert about["step"] == 6
    assert about["guidance_scale"] == 2.0
    assert about["training"]["prompt_drop"] == 0.1
    untrained = ControlNet.from_unet(load_base(pipeline_folder).unet, (4, 6, 8, 10))
    moved = [name for name, p in controlnet.named_parameters() if not torch.equal(p, untrained.get_parameter(name))]
    assert len(moved) > 0.9 * len(list(controlnet.parameters()))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    watched = [line for line in lines if "condition_sensitivity" in line]
    assert [line["step"] for line in watched] == [3, 6]
    assert all(line["condition_sensitivity"] > 0 and 0 <= line["hint_iou"] <= 1 for line in watched)
    with Image.open(finished / "samples_00000006.png") as picture:
        assert picture.size == (train.WATCHED * 66 + 2, 3 * 66 + 2)


def test_only_the_controlnet_is_trained_and_the_base_stays_as_it_is(call, pipeline_folder, tmp_path, monkeypatch):
    seen = {}

    def remember(*arguments, **options):
        seen["base"] = load_base(*arguments, **options)
        return seen["base"]

    init = Trainer.__init__

    def watch(trainer, *arguments, **options):
        init(trainer, *arguments, **options)
        seen["trainer"] = trainer

    monkeypatch.setattr(train, "load_base", remember)
    monkeypatch.setattr(Trainer, "__init__", watch)
    call(tmp_path / "run", "--steps", "2")
    fresh = load_base(pipeline_folder)
    for part in ("vae", "text_encoder", "unet"):
        for name, tensor in getattr(fresh, part).state_dict().items():
            assert torch.equal(tensor, getattr(seen["base"], part).state_dict()[name]), (part, name)
        assert all(p.grad is None for p in getattr(seen["base"], part).parameters())
        assert not getattr(seen["base"], part).training
    optimized = {id(p) for group in seen["trainer"].raw_optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in seen["trainer"].model.parameters()}


def test_a_killed_run_ends_like_an_undisturbed_one(call, finished, tmp_path, monkeypatch):
    whole = Trainer.take_step

    def killed(trainer):
        if trainer.step == 4:
            raise KeyboardInterrupt
        return whole(trainer)

    monkeypatch.setattr(Trainer, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "run")
    monkeypatch.undo()
    call(tmp_path / "run")
    state, _ = load_tensors(tmp_path / "run" / "state_00000006.safetensors")
    expected, _ = load_tensors(finished / "state_00000006.safetensors")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_training_goes_on_from_an_earlier_controlnet(call, finished, tmp_path):
    folder = call(tmp_path / "run", "--steps", "1", "--lr", "1e-9", "--init", str(finished / "controlnet"))
    before, after = (ControlNet.load(path)[0].state_dict() for path in (finished / "controlnet", folder))
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-3


def test_prompts_are_dropped_as_often_as_told_and_hints_keep_their_targets(circles, pipeline_folder):

    base, pairs = load_base(pipeline_folder), read_pairs(circles / "prompt.json")
    cache = encode_pairs(base, pairs, read_hints(pairs, circles, 64, "target"), None)
    hints = read_hints(pairs, circles, 64)
    batches = train.PairBatches(cache, hints, torch.arange(44), base.schedule, 400, 0.25, seed=0)
    batch = batches(0, seeded_generator(0, 1, 0))
    empty = base.encode_prompts([""])[0]
    dropped = (batch["context"] - empty).flatten(1).abs().amax(1) < 1e-3
    assert dropped.sum().item() == pytest.approx(100, abs=35)
    by_hint = {hint.numpy().tobytes(): k for k, hint in enumerate(hints)}
    contexts, latents = base.encode_prompts([pair.prompt for pair in pairs]), cache.latents
    for k in range(40):
        own = by_hint[batch["hint"][k].numpy().tobytes()]
        assert torch.equal(batch["x0"][k], latents[own].float())
        if not dropped[k]:
            assert (batch["context"][k] - contexts[own]).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--prompt-drop", "2"], "--prompt-drop 2.0 --min-snr-gamma 0.0: 0 to 1, and at least 0"),
        (["--hint-channels", "4", "8"], "--hint-channels: 2 widths fold 2 pixels, not 8"),
        (["--image-size", "60"], "--image-size 60: must be divisible by 8"),
        (["--base", "{tmp}/absent"], "{tmp}/absent: no such"),
        (["--data", "{tmp}/absent"], "{tmp}/absent/prompt.json: no such file"),
        (["--init", "{tmp}/absent"], "{tmp}/absent: no such"),
    ],
)
def test_bad_arguments_are_one_clear_line(call, tmp_path, flags, complaint):
    with pytest.raises(UserError) as error:
        call(tmp_path / "run", *(flag.format(tmp=tmp_path) for flag in flags))
    assert complaint.format(tmp=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_watch_sees_control_where_there_is_some(circles, pipeline_folder, controlnet_folder):

    base, pairs = load_base(pipeline_folder), read_pairs(circles / "prompt.json")
    cache = encode_pairs(base, pairs, read_hints(pairs, circles, 64, "target"), None)
    batches = train.PairBatches(cache, read_hints(pairs, circles, 64), torch.arange(44), base.schedule, 4, 0.0, seed=0)
    watch = train.Watch(base, batches(0, seeded_generator(0, 3)), 2.0)
    with torch.no_grad():
        assert watch.sensitivity(ControlNet.from_unet(base.unet, (4, 6, 8, 10))) == 0
        assert watch.sensitivity(ControlNet.load(controlnet_folder)[0]) > 1e-3
    # Targets in place of what is drawn: every disc lies where its hint has it.
    watch.images = lambda controlnet: torch.from_numpy(
        np.stack([np.asarray(Image.open(circles / pairs[k].target)) for k in order(watch, circles, pairs)])
    ).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert watch.measure(ControlNet.load(controlnet_folder)[0])["hint_iou"] > 0.95


def order(watch, circles, pairs):
    """Which pairs the watched hints belong to."""
    hints = [hint.numpy().tobytes() for hint in read_hints(pairs, circles, 64)]
    return [hints.index(hint.numpy().tobytes()) for hint in watch.batch["hint"]]
