"""What may be handed in: every kind of noise file gives its image, every mistake one line on stderr and no files."""

import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.checkpoint import load_tensors, save_tensors
from p2_ddim import sample
from p2_ddim.sampler import FaceSampler
from tests.programs import parse

# The forms in which people save a noise; each gets one (1, 3, 16, 16) whose values fp16 and bf16 can hold.
FORMS = {
    "3-D": lambda noise: noise[0],
    "fp64": lambda noise: noise.double(),
    "fp16": lambda noise: noise.half(),
    "bf16": lambda noise: noise.bfloat16(),
    "parameter": nn.Parameter,
    "dict": lambda noise: {"noise": noise},
    "transposed": lambda noise: noise.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("kind", [*FORMS, "legacy", "safetensors", "gpu", "pth", "dots"])
def test_noises_of_every_kind_give_the_same_image(kind, noise_folder, tmp_path, draw_faces, monkeypatch):
    noise = torch.load(noise_folder / "00.pt", weights_only=True).bfloat16().float()
    torch.save(noise, noise_folder / "00.pt")
    expected = draw_faces(noise_folder / "00.pt")["00.png"]
    path = tmp_path / {"safetensors": "00.safetensors", "pth": "00.pth", "dots": "0.0.pt"}.get(kind, "00.pt")
    if kind == "safetensors":
        save_file({"noise": noise}, path, {"about": "noise of the TA"})
    else:
        if kind == "gpu":
            monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        form = FORMS.get(kind, lambda noise: noise)
        torch.save(form(noise), path, _use_new_zipfile_serialization=kind != "legacy")
    assert np.array_equal(draw_faces(path)[f"{path.stem}.png"], expected)


def test_several_images_in_a_file_and_several_sizes_in_a_folder(noise_folder, tmp_path, draw_faces, capsys):
    folder = tmp_path / "several"
    folder.mkdir()
    noises = [torch.load(noise_folder / f"{k:02d}.pt", weights_only=True) for k in range(4)]
    torch.save(torch.cat(noises), folder / "many.pt")
    torch.save(torch.randn(3, 8, 24), folder / "wide.pt")
    apart, together = draw_faces(noise_folder), draw_faces(folder)
    assert sorted(together) == ["many_00.png", "many_01.png", "many_02.png", "many_03.png", "wide.png"]
    assert together["wide.png"].shape == (8, 24, 3)
    for k in range(4):
        assert np.abs(together[f"many_{k:02d}.png"] - apart[f"{k:02d}.png"]).max() <= 1
    assert "wide is 24x8" in capsys.readouterr().err


class Code:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def bad_noise(content):
    return lambda noise, weights, tmp: torch.save(content, noise / "02.pt")


def bad_weights(content):
    def write(noise, weights, tmp):
        torch.save(content, tmp / "UNet.pt")
        return {"weights": tmp / "UNet.pt"}

    return write


def changed(change):
    """The same weights after a change of their tensors or of the facts about them."""

    def write(noise, weights, tmp):
        tensors, about = load_tensors(weights)
        change(tensors, about)
        save_tensors(tmp / "changed.safetensors", tensors, about)
        return {"weights": tmp / "changed.safetensors"}

    return write


def same_name(noise, weights, tmp):
    save_file({"noise": torch.randn(3, 16, 16)}, noise / "02.safetensors")


# What is done to good input (it may return other arguments), and what the line on stderr then says.
MISTAKES = {
    "no noise folder": (lambda noise, weights, tmp: {"noise": tmp / "none"}, ["none: no such folder"]),
    "no noise files": (lambda noise, weights, tmp: {"noise": tmp}, ["holds no noises"]),
    "truncated noise": (lambda noise, weights, tmp: os.truncate(noise / "02.pt", 600), ["02.pt: truncated"]),
    "an object": (bad_noise(Namespace(seed=1)), ["02.pt: holds a argparse.Namespace, not one tensor"]),
    "channels": (bad_noise(torch.randn(1, 4, 16, 16)), ["02.pt", "(1, 4, 16, 16)", "(N, 3, H, W)"]),
    "dimensions": (bad_noise(torch.randn(16, 16)), ["02.pt", "(16, 16)"]),
    "stride": (bad_noise(torch.randn(3, 16, 18)), ["02.pt", "(3, 16, 18)", "divisible by 4"]),
    "no images": (bad_noise(torch.randn(0, 3, 16, 16)), ["02.pt", "(0, 3, 16, 16)"]),
    "dtype": (bad_noise(torch.zeros(3, 16, 16, dtype=torch.int64)), ["02.pt", "torch.int64"]),
    "nan": (bad_noise(torch.full((3, 16, 16), torch.nan)), ["02.pt", "NaN"]),
    "too large for fp32": (bad_noise(torch.full((3, 16, 16), 1e300, dtype=torch.float64)), ["02.pt", "infinite"]),
    "sparse": (bad_noise(torch.randn(3, 16, 16).to_sparse()), ["02.pt", "sparse"]),
    "several tensors": (bad_noise([torch.zeros(3, 16, 16)] * 2), ["02.pt", "2 things"]),
    "no tensor": (bad_noise("noise"), ["02.pt", "str"]),
    "same name": (same_name, ["02.png", "rename"]),
    "code in a noise": (bad_noise(Code()), ["02.pt", "code"]),
    "code in weights": (bad_weights({"down1.bias": Code()}), ["UNet.pt", "code"]),
    "missing keys": (changed(lambda tensors, about: tensors.pop("out.2.bias")), ["changed", "1 missing", "out.2.bias"]),
    "no prediction": (changed(lambda tensors, about: about.pop("prediction")), ["changed", "prediction"]),
    "unknown config": (changed(lambda tensors, about: about["config"].update(a=3)), ["changed", "another version"]),
    "another model": (changed(lambda tensors, about: about.update(kind="ContextUNet")), ["changed", "ContextUNet"]),
    "numbers for names": (bad_weights({0: torch.zeros(9)}), ["UNet.pt: holds no named tensors"]),
    "numbers for weights": (bad_weights({"epoch": 3}), ["UNet.pt: holds no named tensors"]),
    "a list of weights": (bad_weights([1, 2]), ["UNet.pt: holds no named tensors"]),
    "no weights": (lambda noise, weights, tmp: {"weights": tmp / "UNet.pt"}, ["UNet.pt: no such"]),
    "out is a file": (lambda noise, weights, tmp: (tmp / "out").touch(), ["out: is a file"]),
}
BAD = "--eta 1.5", "--steps 0", "--steps 1000", "--batch-size 0", "--batch-size many", "--seed -1", "--device tpu"
MISTAKES |= {flags: (lambda *_, flags=flags: {"flags": flags.split()}, [flags]) for flags in BAD}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_and_writes_nothing(
    mistake, noise_folder, tmp_path, face_weights, refusal, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    spoil, words = MISTAKES[mistake]
    arguments = {"noise": noise_folder, "out": tmp_path / "out", "weights": face_weights, "flags": ()}
    arguments |= spoil(noise_folder, face_weights, tmp_path) or {}
    *paths, more = arguments.values()
    line = refusal(sample.main, parse(sample, *paths, *more))
    assert all(word in line for word in words), line
    assert (tmp_path / "out").exists() == (mistake == "out is a file")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("precision", "mend"), [("fp32", "name other weights"), ("fp16", "choose bf16 or fp32")])
def test_an_image_that_is_not_finite_is_not_saved(precision, mend, tmp_path, monkeypatch, refusal):
    def overflow(self, xt, t):
        return torch.stack([torch.zeros_like(xt[0]), *torch.full_like(xt[1:], torch.nan)])

    monkeypatch.setattr(FaceSampler, "predict", overflow)
    args = parse(sample, sample.EXAMPLES / "noise", tmp_path / "out", "--precision", precision, "--steps", 3)
    line = refusal(sample.main, args)
    assert line == f"01: drawn in {precision} it is not finite; {mend}"
    assert list((tmp_path / "out").iterdir()) == []
