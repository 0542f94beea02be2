"""Training the Context-UNet through its own script: batches, resume, processes, precision, and bad input."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from common.checkpoint import load_about, load_model_file, load_strictly, load_tensors
from common.data import to_unit_range
from common.runtime import seeded_generator
from common.schedule import NoiseSchedule
from p1_ddpm import train as program
from p1_ddpm.digits import DOMAINS, read_digits
from p1_ddpm.model import ContextUNet, ContextUNetConfig
from p1_ddpm.train import DigitBatches
from tests.programs import parse, run
from tests.shell import ENVIRONMENT, ROOT, call
from tests.training import killed_at, metrics, newest, same_files

SMALL = [
    *("--image-size", "8", "--widths", "8", "16", "--blocks", "1", "1", "--batch-size", "8", "--steps", "20"),
    *("--warmup", "3", "--lr", "5e-3", "--precision", "fp32", "--device", "cpu"),
    *("--log-every", "1", "--save-every", "10", "--validate-every", "10", "--sample-every", "100"),
]


def train(digits, out, *flags):
    return run(program, "--data", digits, "--out", out, *SMALL, *flags)


def make_batches(digits, batch_size=8, **options):
    return DigitBatches(read_digits(digits, size=8), DOMAINS, NoiseSchedule("cosine"), batch_size, **options)


@pytest.fixture(scope="session")
def finished(digits, tmp_path_factory):
    """An undisturbed run of twenty steps."""
    out = tmp_path_factory.mktemp("finished")
    train(digits, out, "--sample-every", "20")
    return out


def test_a_run_leaves_its_weights_states_log_and_pictures(finished):
    weights = [f"{name}.safetensors" for name in ("best", "model", "state_00000010", "state_00000020")]
    names = [*weights, "metrics.jsonl", "samples_00000020.png", "tensorboard"]
    assert sorted(path.name for path in finished.iterdir()) == sorted(names)
    with Image.open(finished / "samples_00000020.png") as picture:
        # Two rows of ten 8x8 images, doubled, with white lines of 2 pixels around them.
        assert picture.size == (10 * 18 + 2, 2 * 18 + 2)
    kinds = [set(line) - {"step"} for line in metrics(finished)]
    assert kinds.count({"loss", "norm", "lr"}) == 20
    assert kinds.count({"validation_loss"}) == 2
    losses = [line["loss"] for line in metrics(finished) if "loss" in line]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_the_finished_file_rebuilds_the_averaged_model_alone(finished):
    state, about = load_model_file(finished / "model.safetensors", "ContextUNet")
    training = {"lr": 5e-3, "label_drop": 0.15, "augment": ["svhn"], "weights": {"mnistm": 1.0, "svhn": 1.0}}
    assert about["training"] == about["training"] | training
    assert about == about | {"step": 20, "prediction": "v", "domains": DOMAINS, "image_size": 8}
    assert about["validation_loss"] == pytest.approx(metrics(finished)[-1]["validation_loss"])
    assert NoiseSchedule(**about["schedule"]).name == "cosine"
    model = ContextUNet(ContextUNetConfig(**about["config"]))
    load_strictly(model, state, "model")
    averaged = load_tensors(finished / "state_00000020.safetensors", "ema.")[0]
    for name, tensor in model.state_dict().items():
        assert (tensor - averaged[name]).abs().max() <= 1e-3 * averaged[name].abs().max()


def test_ten_steps_a_kill_and_ten_more_are_twenty(digits, finished, tmp_path):
    """In every bit: weights, averages, moments and log. The kill comes three steps after the last save."""
    with killed_at(13):
        train(digits, tmp_path, "--sample-every", "20")
    assert [path.name for path in tmp_path.glob("state_*")] == ["state_00000010.safetensors"]
    assert metrics(tmp_path)[-1]["step"] == 13
    train(digits, tmp_path, "--sample-every", "20")
    for name in ("state_00000020", "best", "model"):
        assert same_files(tmp_path / f"{name}.safetensors", finished / f"{name}.safetensors")
    assert any(key.startswith("optimizer.") and key.endswith("exp_avg_sq") for key in newest(tmp_path)[0])
    assert metrics(tmp_path) == metrics(finished)
    assert (tmp_path / "samples_00000020.png").read_bytes() == (finished / "samples_00000020.png").read_bytes()


@pytest.mark.slow
def test_kills_in_the_middle_of_saves_change_nothing(digits, tmp_path):
    """The same command after every SIGKILL; the tenth is left alone."""
    flags, whole, out = ["--steps", "100", "--save-every", "1"], tmp_path / "whole", tmp_path / "killed"
    train(digits, whole, *flags)
    script = [ROOT / "p1_ddpm" / "train.py", "--data", digits, "--out", out, *SMALL, *flags]
    for _ in range(9):
        before = set(out.glob("state_*"))
        process = subprocess.Popen([sys.executable, *script], env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
        while set(out.glob("state_*")) == before or not any(out.glob(".unfinished-*")):
            assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    assert call(sys.executable, *script, patience=600).returncode == 0
    assert not list(out.glob(".unfinished-*"))
    for name in ("state_00000099", "state_00000100", "best", "model"):
        assert same_files(whole / f"{name}.safetensors", out / f"{name}.safetensors"), name
    assert metrics(whole) == metrics(out)


def test_two_processes_train_as_one(digits, tmp_path):
    """Each takes its half of every batch; what is left between the runs is the rounding of sums."""
    flags = ["--steps", "6", "--lr", "1e-3"]
    train(digits, tmp_path / "one", *flags)
    # Without --multi_gpu accelerate starts a single process on a CPU, whatever --num_processes says.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    script = [ROOT / "p1_ddpm" / "train.py", "--data", digits, "--out", tmp_path / "two", *SMALL, *flags]
    environment = {"OMP_NUM_THREADS": 1, "HF_HOME": tmp_path / "hf"}
    result = call(*launch, "--main_process_port", "0", *script, patience=600, **environment)
    assert result.returncode == 0, result.stderr
    told = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert told == ["2 processes, 4 images each at a time", "step 6"]
    for line, other in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_any_csv_trains_and_augmentation_follows_the_data(digits, tmp_path):
    table = digits / "mnistm" / "train.csv"
    about = load_about(run(program, "--csv", table, "--out", tmp_path, *SMALL, "--steps", 2))
    assert about["domains"] == {"mnistm": 10}
    assert about["config"]["num_labels"] == 10
    train(digits, tmp_path / "jittered", "--steps", "2", "--augment", "mnistm", "svhn")


def test_a_batch_shares_both_domains_and_drops_labels(digits):
    batches = make_batches(digits, batch_size=1000, drop=0.15)
    batch = batches(0, seeded_generator(0, 1, 0))
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "x0": (1000, 3, 8, 8), "labels": (1000,), "t": (1000,), "eps": (1000, 3, 8, 8),
    }  # fmt: skip
    counts = torch.bincount(batch["labels"], minlength=21)
    assert counts[20] == pytest.approx(150, abs=40)
    assert counts[:10].sum().item() == pytest.approx(counts[10:20].sum().item(), abs=60)
    assert torch.equal(batch["t"].sort().values, torch.arange(1000))


@pytest.mark.parametrize(
    ("weights", "counts"), [({}, (4, 4)), ({"svhn": 3.0}, (2, 6)), ({"mnistm": 3.0, "svhn": 2.0}, (5, 3))]
)
def test_domains_come_as_often_as_their_weights_say(digits, weights, counts):
    labels = make_batches(digits, weights=weights)(0, seeded_generator(0, 1, 0))["labels"]
    assert ((labels < 10).sum(), (labels >= 10).sum()) == counts


def test_labels_belong_to_their_images(digits):
    def pairs(images, labels):
        return {(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels)}

    sets = read_digits(digits, size=8)
    truth = (pairs(to_unit_range(sets[name].images), sets[name].labels + 10 * k) for k, name in enumerate(DOMAINS))
    batches = make_batches(digits, batch_size=40)
    drawn = [batches(step, seeded_generator(0, 1, step)) for step in range(2)]
    # Two batches of twenty each are one epoch of both domains.
    assert set().union(*(pairs(batch["x0"], batch["labels"]) for batch in drawn)) == set().union(*truth)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--data", "{tmp}/absent"], "{tmp}/absent: holds neither mnistm/train.csv nor svhn/train.csv; set --data"),
        (["--csv", "{tmp}/absent.csv"], "{tmp}/absent.csv: no such file"),
        (["--csv", "{tmp}/few/train.csv"], "{tmp}/few/train.csv: 3 images of few; give at least 10"),
        (["--image-size", "10"], "--image-size 10: must be divisible by 4"),
        (["--augment", "usps"], "--augment usps: no such domain; choose from mnistm, svhn"),
        (["--weights", "usps=2"], "--weights usps=2: must be DOMAIN=W with W above 0 and one of mnistm, svhn"),
        (["--weights", "svhn=nan"], "--weights svhn=nan: must be DOMAIN=W with W above 0 and one of mnistm, svhn"),
        (["--widths", "7", "8"], "--widths, --blocks: width 7"),
        (["--label-drop", "2"], "--label-drop 2.0"),
        (["--min-snr-gamma", "nan"], "--min-snr-gamma nan"),
        # Every tenth image of these is a nine, which the 2025 layout's mnistm does not hold.
        (["--layout", "2025"], "--layout 2025: leaves too few images of mnistm to hold some out; give more"),
        (["--init", "{weights}"], "{weights}: does not fit ContextUNet"),
        (["--init", "{weights}", "--prediction", "eps"], "--init {weights}: its prediction is v, not eps"),
    ],
)
def test_bad_input_is_refused_in_one_line(digits, tmp_path, tiny_digit_weights, refusal, flags, complaint):
    def filled(text):
        return text.replace("{tmp}", str(tmp_path)).replace("{weights}", str(tiny_digit_weights))

    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "train.csv").write_text("image_name,label\n" + "a.png,1\n" * 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "a.png")
    args = parse(program, "--data", digits, "--out", tmp_path / "out", *SMALL, *map(filled, flags))
    assert refusal(program.main, args).startswith(filled(complaint))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_init_starts_from_finished_weights(digits, finished, tmp_path):
    """With a learning rate of next to nothing, the weights that come out are those that went in."""
    still, source = ["--steps", "1", "--lr", "1e-12", "--seed", "5"], finished / "model.safetensors"
    path = train(digits, tmp_path / "second", *still, "--init", str(source))
    (before, _), (after, about) = load_tensors(source), load_tensors(path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert about["training"]["init"] == str(source)
    other = load_tensors(train(digits, tmp_path / "third", *still))[0]
    assert not all(torch.equal(before[name], other[name]) for name in before)
