"""What may be handed in: every kind of noise file gives its image, every mistake one line on stderr and no files."""

import errno
import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.checkpoint import load_tensors, save_tensors
from common.cli import UserError, run
from p2_ddim import sample
from p2_ddim.sampler import FaceSampler


def on_gpu(storage):
    return "cuda:0"


@pytest.mark.parametrize(
    "kind", ["3-D", "legacy", "safetensors", "gpu", "fp64", "parameter", "dict", "transposed", "pth", "dots"]
)
def test_noises_of_every_kind_give_the_same_image(kind, noise_folder, tmp_path, face_weights, draw_faces, monkeypatch):
    expected = draw_faces(noise_folder / "00.pt", tmp_path / "expected", face_weights)["00.png"]
    noise = torch.load(noise_folder / "00.pt", weights_only=True)
    path = tmp_path / {"safetensors": "00.safetensors", "pth": "00.pth", "dots": "0.0.pt"}.get(kind, "00.pt")
    if kind == "safetensors":
        save_file({"noise": noise}, path)
    elif kind == "legacy":
        torch.save(noise, path, _use_new_zipfile_serialization=False)
    else:
        if kind == "gpu":
            monkeypatch.setattr(torch.serialization, "location_tag", on_gpu)
        swapped = noise.transpose(2, 3).contiguous().transpose(2, 3)
        forms = {
            "3-D": noise[0],
            "gpu": noise,
            "fp64": noise.double(),
            "parameter": nn.Parameter(noise),
            "dict": {"noise": noise},
            "transposed": swapped,
        }
        torch.save(forms.get(kind, noise), path)
    assert np.array_equal(draw_faces(path, tmp_path / "out", face_weights)[f"{path.stem}.png"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noises_of_half_precision_are_taken_as_they_are(dtype, noise_folder, tmp_path, face_weights, draw_faces):
    rounded = torch.load(noise_folder / "00.pt", weights_only=True).to(dtype)
    drawn = []
    for name, noise in (("half", rounded), ("full", rounded.float())):
        torch.save(noise, tmp_path / f"{name}.pt")
        drawn += draw_faces(tmp_path / f"{name}.pt", tmp_path / name, face_weights).values()
    assert np.array_equal(*drawn)


def test_several_images_in_a_file_and_several_sizes_in_a_folder(
    noise_folder, tmp_path, face_weights, draw_faces, capsys
):
    noises = torch.cat([torch.load(noise_folder / f"{k:02d}.pt", weights_only=True) for k in range(4)])
    apart = draw_faces(noise_folder, tmp_path / "apart", face_weights)
    folder = tmp_path / "several"
    folder.mkdir()
    torch.save(noises, folder / "many.pt")
    torch.save(torch.randn(3, 8, 24), folder / "wide.pt")
    together = draw_faces(folder, tmp_path / "together", face_weights)
    assert sorted(together) == ["many_00.png", "many_01.png", "many_02.png", "many_03.png", "wide.png"]
    assert together["wide.png"].shape == (8, 24, 3)
    for k in range(4):
        assert np.abs(together[f"many_{k:02d}.png"].astype(int) - apart[f"{k:02d}.png"]).max() <= 1
    assert "wide is 24x8" in capsys.readouterr().err


class Malicious:
    """What runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def bad_noise(content):
    return lambda noise, weights, tmp: torch.save(content, noise / "02.pt")


def no_noises(noise, weights, tmp):
    for path in noise.iterdir():
        path.rename(path.with_suffix(".txt"))


def same_name(noise, weights, tmp):
    save_file({"noise": torch.randn(3, 16, 16)}, noise / "02.safetensors")


def malicious_noise(noise, weights, tmp):
    torch.save(Malicious(tmp / "ran"), noise / "02.pt")


def malicious_weights(noise, weights, tmp):
    torch.save({"down1.bias": Malicious(tmp / "ran")}, tmp / "UNet.pt")
    return {"weights": tmp / "UNet.pt"}


def malicious_plain_pickle(noise, weights, tmp):
    (tmp / "UNet.pt").write_bytes(pickle.dumps(Malicious(tmp / "ran")))
    return {"weights": tmp / "UNet.pt"}


def changed(change):
    """The same weights after a change of their tensors or of the facts about them."""

    def write(noise, weights, tmp):
        tensors, about = load_tensors(weights)
        change(tensors, about)
        save_tensors(tmp / "changed.safetensors", tensors, about)
        return {"weights": tmp / "changed.safetensors"}

    return write


def truncated_weights(noise, weights, tmp):
    torch.save({"down1.bias": torch.zeros(999)}, tmp / "UNet.pt")
    cut(tmp / "UNet.pt")
    return {"weights": tmp / "UNet.pt"}


def numbered_weights(noise, weights, tmp):
    torch.save({0: torch.zeros(9)}, tmp / "UNet.pt")
    return {"weights": tmp / "UNet.pt"}


def other_model(noise, weights, tmp):
    save_tensors(tmp / "other.safetensors", {"x": torch.zeros(1)}, {"kind": "ContextUNet"})
    return {"weights": tmp / "other.safetensors"}


def file_in_the_way(noise, weights, tmp):
    (tmp / "out").write_text("not a folder")
    return {"kept": True}


# What is done to good input, and what the line on stderr then says.
MISTAKES = {
    "no noise folder": (lambda noise, weights, tmp: {"noise": tmp / "none"}, ["none: no such folder"]),
    "no noise files": (no_noises, ["noise: holds no noises"]),
    "truncated noise": (lambda noise, weights, tmp: cut(noise / "02.pt"), ["02.pt: truncated"]),
    "empty noise": (lambda noise, weights, tmp: cut(noise / "02.pt", 0), ["02.pt: truncated"]),
    "channels": (bad_noise(torch.randn(1, 4, 16, 16)), ["02.pt", "(1, 4, 16, 16)", "(N, 3, H, W)"]),
    "dimensions": (bad_noise(torch.randn(16, 16)), ["02.pt", "(16, 16)"]),
    "stride": (bad_noise(torch.randn(3, 16, 18)), ["02.pt", "(3, 16, 18)", "divisible by 4"]),
    "no images": (bad_noise(torch.randn(0, 3, 16, 16)), ["02.pt", "(0, 3, 16, 16)"]),
    "dtype": (bad_noise(torch.zeros(3, 16, 16, dtype=torch.int64)), ["02.pt", "torch.int64"]),
    "nan": (bad_noise(torch.full((3, 16, 16), torch.nan)), ["02.pt", "NaN"]),
    "infinity": (bad_noise(torch.full((3, 16, 16), -torch.inf)), ["02.pt", "infinite"]),
    "too large for fp32": (bad_noise(torch.full((3, 16, 16), 1e300, dtype=torch.float64)), ["02.pt", "infinite"]),
    "sparse": (bad_noise(torch.randn(3, 16, 16).to_sparse()), ["02.pt", "sparse"]),
    "several tensors": (bad_noise([torch.zeros(3, 16, 16)] * 2), ["02.pt", "2 things"]),
    "no tensor": (bad_noise("noise"), ["02.pt", "str"]),
    "same name": (same_name, ["02.png", "rename"]),
    "code in a noise": (malicious_noise, ["02.pt", "code"]),
    "code in weights": (malicious_weights, ["UNet.pt", "code"]),
    "code in a plain pickle": (malicious_plain_pickle, ["UNet.pt", "code"]),
    "missing keys": (
        changed(lambda tensors, about: [tensors.pop(f"mid1.resblocks.norm{k}.weight") for k in (1, 2)]),
        ["changed.safetensors", "2 missing", "mid1.resblocks.norm1.weight"],
    ),
    "other shapes": (
        changed(lambda tensors, about: tensors.update({"out.2.bias": torch.zeros(7)})),
        ["changed.safetensors", "out.2.bias (7,) for (12,)"],
    ),
    "no prediction": (changed(lambda tensors, about: about.pop("prediction")), ["changed.safetensors", "prediction"]),
    "unknown config": (
        changed(lambda tensors, about: about["config"].update(colour=3)),
        ["changed.safetensors", "another version", "colour"],
    ),
    "truncated weights": (truncated_weights, ["UNet.pt: truncated"]),
    "numbers for names": (numbered_weights, ["UNet.pt: no state dict"]),
    "another model": (other_model, ["other.safetensors", "ContextUNet"]),
    "weights are a folder": (lambda noise, weights, tmp: {"weights": tmp}, ["is a folder"]),
    "no weights": (lambda noise, weights, tmp: {"weights": tmp / "UNet.pt"}, ["UNet.pt: no such"]),
    "out is a file": (file_in_the_way, ["out: is a file"]),
    "out below a file": (lambda noise, weights, tmp: {"out": noise / "00.pt" / "out"}, ["00.pt", "cannot be written"]),
    "name too long": (lambda noise, weights, tmp: {"out": tmp / ("o" * 300)}, ["ooo", "name too long"]),
    "eta": (lambda noise, weights, tmp: {"flags": ["--eta", "1.5"]}, ["--eta 1.5"]),
    "steps": (lambda noise, weights, tmp: {"flags": ["--steps", "0"]}, ["--steps 0"]),
    "too many leading steps": (lambda noise, weights, tmp: {"flags": ["--steps", "1000"]}, ["--steps 1000"]),
    "seed": (lambda noise, weights, tmp: {"flags": ["--seed", "-1"]}, ["--seed -1"]),
    "device": (lambda noise, weights, tmp: {"flags": ["--device", "tpu"]}, ["--device tpu"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_and_writes_nothing(mistake, noise_folder, tmp_path, face_weights, capsys):
    spoil, words = MISTAKES[mistake]
    changes = spoil(noise_folder, face_weights, tmp_path)
    changes = changes if isinstance(changes, dict) else {}
    out = changes.get("out", tmp_path / "out")
    args = sample.parse_arguments(
        [str(path) for path in (changes.get("noise", noise_folder), out, changes.get("weights", face_weights))]
        + changes.get("flags", [])
    )
    with pytest.raises(SystemExit) as caught:
        run(sample.main, args)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert out.is_file() if changes.get("kept") else not os.path.exists(out)  # Path.exists stumbles over long names
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("flags", [["--batch-size", "0"], ["--batch-size", "many"], ["--save-range", "unit"]])
def test_a_wrong_flag_gives_one_line(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.parse_arguments(flags)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("fails", "word"), [(Path.is_file, "noise: Permission denied"), (Path.mkdir, "out: cannot be written")]
)
def test_what_the_system_refuses_gives_one_line(fails, word, noise_folder, tmp_path, face_weights, monkeypatch, capsys):
    """As it does for a user who may not enter a folder; a test that runs as root may enter all."""

    def refused(self, *args, **options):
        if self.name in ("noise", "out"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return fails(self, *args, **options)

    args = sample.parse_arguments([str(path) for path in (noise_folder, tmp_path / "out", face_weights)])
    monkeypatch.setattr(Path, fails.__name__, refused)
    with pytest.raises(SystemExit) as caught:
        run(sample.main, args)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert word in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("precision", "mend"), [("fp32", "name other weights"), ("fp16", "choose bf16 or fp32")])
def test_an_image_that_is_not_finite_is_not_saved(
    precision, mend, noise_folder, tmp_path, face_weights, monkeypatch, capsys
):
    def overflow(self, xt, t):
        output = torch.zeros_like(xt)
        output[1:] = torch.nan
        return output

    monkeypatch.setattr(FaceSampler, "denoise", overflow)
    paths = [str(path) for path in (noise_folder, tmp_path / "out", face_weights)]
    with pytest.raises(SystemExit) as caught:
        run(sample.main, sample.parse_arguments([*paths, "--precision", precision, "--steps", "3"]))
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: 01: drawn in {precision} it is not finite; {mend}\n"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--batch-size", "4"]])
def test_a_batch_that_does_not_fit_is_halved_unless_somebody_chose_it(
    flags, noise_folder, tmp_path, face_weights, draw_faces, monkeypatch
):
    expected = draw_faces(noise_folder, tmp_path / "expected", face_weights)
    denoise = FaceSampler.denoise

    def small(self, xt, t):
        if len(xt) > 1 and t < 900:
            raise torch.OutOfMemoryError
        return denoise(self, xt, t)

    monkeypatch.setattr(FaceSampler, "denoise", small)
    if flags:
        with pytest.raises(UserError, match=r"4 images of 16x16 .* choose a smaller --batch-size"):
            draw_faces(noise_folder, tmp_path / "out", face_weights, *flags)
        return
    drawn = draw_faces(noise_folder, tmp_path / "out", face_weights)
    assert drawn.keys() == expected.keys()
    assert all(np.abs(drawn[name].astype(int) - expected[name]).max() <= 1 for name in drawn)


def test_a_failure_halfway_leaves_no_images(noise_folder, tmp_path, face_weights, monkeypatch):
    calls = itertools.count()

    def fail_at_last(self, xt, t):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return torch.zeros_like(xt)

    monkeypatch.setattr(FaceSampler, "denoise", fail_at_last)
    paths = [str(path) for path in (noise_folder, tmp_path / "out", face_weights)]
    with pytest.raises(SystemExit) as caught:
        run(sample.main, sample.parse_arguments([*paths, "--batch-size", "1", "--steps", "3"]))
    assert caught.value.code == 130
    assert list((tmp_path / "out").iterdir()) == []
