"""The work of each problem, built on any device: on torch's meta device it is counted, on a real one it is timed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.counting import Count, count
from common.runtime import autocast
from common.schedule import NoiseSchedule
from common.training import diffusion_loss
from latent_diffusion.files import SD_V1
from p1_ddpm.model import ContextUNet
from p2_ddim.model import FaceUNet, FaceUNetConfig
from p3_controlnet.model import ControlNet
from p3_controlnet.sample import BASE
from p3_controlnet.unet import ControlledUNet

# What `p2_ddim/train.py` trains by default.
OWN_FACES = FaceUNetConfig(
    patch_size=2, widths=(64, 128, 192), blocks=1, attention=(False, False, True), middle_attention=(True,),
    embedding=256, means=True,
)  # fmt: skip
MINIATURE_HINT_CHANNELS = (16, 32, 48, 64)
# A step of AdamW with clipping and averaged weights touches a trained parameter so often: 7 numbers of AdamW, 3 for the
# gradient's norm and scaling, 3 of the average, each of four bytes.
UPDATE_BYTES = 52
# fp32 weights, both moments and the average; the gradient is counted with the step, which makes it.
STATE_BYTES = 16


@dataclass(frozen=True)
class Work:
    """One kind of model at work.

    Attributes:
        name: what it is.
        batch: pictures a training step, of one process.
        step: the loss of one training step.
        steps: of the reverse process.
        passes: evaluations a step and picture; 2 with guidance.
        predict: one step's evaluations for so many pictures.
        encode: what is done once a picture before or after all steps (prompt, hint, decoding).
        models: all networks.
        trained: parameters that are trained.
        host_bytes: of one training picture while training, as the training script keeps it.
        mapped: whether these lie in mapped files, of which the processes of a node share one copy.
        precompute: what a cache saves each training step, of one picture; None if there is nothing.
        drawn_in: layout of the weights while drawing; training has channels_last.
    """

    name: str
    batch: int
    step: Callable[[], Tensor]
    steps: int
    passes: int
    predict: Callable[[int], Tensor]
    encode: Callable[[int], object]
    models: Sequence[nn.Module]
    trained: Sequence[nn.Parameter]
    host_bytes: int
    mapped: bool = False
    precompute: Callable[[], object] | None = None
    drawn_in: torch.memory_format = torch.channels_last

    @property
    def trained_count(self) -> int:
        """Trained parameters."""
        return sum(parameter.numel() for parameter in self.trained)

    @property
    def frozen_count(self) -> int:
        """All other parameters."""
        known = {id(parameter) for parameter in self.trained}
        return sum(p.numel() for model in self.models for p in model.parameters() if id(p) not in known)

    @property
    def states(self) -> int:
        """Bytes that stay while training: weights, the optimizer's moments, the average, and the frozen weights."""
        return STATE_BYTES * self.trained_count + 4 * self.frozen_count

    def training_step(self) -> Count:
        """A training step, its update included; only on the meta device."""
        counted = count(lambda: self.step().backward())
        for parameter in self.trained:
            parameter.grad = None
        return counted + Count(0, UPDATE_BYTES * self.trained_count, 0, 0)

    def one_picture(self) -> Count:
        """Drawing one picture; only on the meta device."""
        with torch.no_grad():
            return count(lambda: self.predict(1)) * self.steps + count(lambda: self.encode(1))

    def cached(self) -> Count | None:
        """What the cache of latents and contexts saves each time that one picture is trained on."""
        with torch.no_grad():
            return count(self.precompute) if self.precompute else None


def batch_of(batch: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """x0, eps and t; further conditions are added by the caller."""
    x0 = torch.zeros(batch, *shape)
    return {"x0": x0, "eps": torch.ones_like(x0), "t": torch.full((batch,), 500)}


def digits(precision: str) -> Work:
    """Problem 1 as it is trained and drawn by default."""
    model, schedule, shape = ContextUNet(), NoiseSchedule("cosine"), (3, 28, 28)
    device = model.stem.weight.device

    def step() -> Tensor:
        with autocast(device, precision):
            batch = batch_of(128, shape) | {"labels": torch.zeros(128, dtype=torch.long)}
            return diffusion_loss(model, batch, schedule, "v", 5.0)

    def predict(pictures: int) -> Tensor:
        rows = 2 * pictures
        with autocast(device, precision):
            return model(torch.zeros(rows, *shape), torch.full((rows,), 500), torch.zeros(rows, dtype=torch.long))

    return Work(
        "P1: Context-UNet, 28x28", 128, step, 10, 2, predict, lambda n: None, [model],
        list(model.parameters()), host_bytes=3 * 28 * 28,
    )  # fmt: skip


def faces(precision: str, name: str, config: FaceUNetConfig, size: int, batch: int) -> Work:
    """Problem 2: one of its two networks."""
    model, schedule, shape = FaceUNet(config), NoiseSchedule("cosine"), (3, size, size)
    device = model.out[0].weight.device

    def step() -> Tensor:
        with autocast(device, precision):
            return diffusion_loss(model, batch_of(batch, shape), schedule, "v", 5.0)

    def predict(pictures: int) -> Tensor:
        with autocast(device, precision):
            return model(torch.zeros(pictures, *shape), torch.full((pictures,), 500))

    return Work(
        name, batch, step, 50, 1, predict, lambda n: None, [model], list(model.parameters()), host_bytes=3 * size**2
    )


@dataclass(frozen=True)
class LatentParts:
    """A Stable Diffusion with random weights, built from its configs alone."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel

    @classmethod
    def of(cls, folder: Path) -> "LatentParts":
        """The parts that a pipeline's folder describes, frozen."""
        configs = {name: json.loads((folder / name / "config.json").read_text()) for name in ("vae", "unet")}
        text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
        parts = cls(
            AutoencoderKL.from_config(configs["vae"]),
            CLIPTextModel(text),
            UNet2DConditionModel.from_config(configs["unet"]),
        )
        for model in parts.models:
            model.requires_grad_(False).eval()
        return parts

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """All three."""
        return self.vae, self.text_encoder, self.unet

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape of a latent."""
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    @property
    def pixels(self) -> int:
        """Side of a picture."""
        return self.latent[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def context(self, count: int) -> Tensor:
        """Embedded prompts, (count, 77, width)."""
        ids = torch.zeros(count, self.text_encoder.config.max_position_embeddings, dtype=torch.long)
        return self.text_encoder(ids).last_hidden_state

    def encode_and_forget(self) -> None:
        """What a cache saves of one picture: its latent and its prompt's context."""
        self.vae.encode(torch.zeros(1, 3, self.pixels, self.pixels))
        self.context(1)


def circles(precision: str, name: str, folder: Path, hint_channels: tuple[int, ...], batch: int) -> Work:
    """Problem 3, Fall 2025: a ControlNet beside a frozen base, trained on cached latents."""
    parts = LatentParts.of(folder)
    controlnet = ControlNet.from_unet(parts.unet, hint_channels)
    network, schedule, device = ControlledUNet(parts.unet, [controlnet]), NoiseSchedule("linear"), parts.unet.device
    width, tokens = parts.unet.config.cross_attention_dim, parts.text_encoder.config.max_position_embeddings

    def hints(pictures: int) -> Tensor:
        return torch.zeros(pictures, 3, parts.pixels, parts.pixels)

    def step() -> Tensor:
        condition = {"context": torch.zeros(batch, tokens, width), "hint": hints(batch)}
        with autocast(device, precision):
            return diffusion_loss(network, batch_of(batch, parts.latent) | condition, schedule, "eps", 0.0)

    def predict(pictures: int) -> Tensor:
        rows = 2 * pictures
        features = torch.zeros(rows, 1, parts.unet.config.block_out_channels[0], *parts.latent[1:])
        inputs = torch.zeros(rows, *parts.latent), torch.full((rows,), 500), torch.zeros(rows, tokens, width)
        with autocast(device, precision):
            return network(*inputs, features=features)

    def encode(pictures: int) -> None:
        with autocast(device, precision):
            parts.context(1 + pictures)
            network.encode_hint(hints(pictures))
            parts.vae.decode(torch.zeros(pictures, *parts.latent))

    return Work(
        name, batch, step, 20, 2, predict, encode, [*parts.models, controlnet], list(controlnet.parameters()),
        # Latent and context as fp16, if no two prompts are the same; hints stay in their files.
        host_bytes=2 * (torch.Size(parts.latent).numel() + tokens * width),
        mapped=True,
        precompute=parts.encode_and_forget, drawn_in=torch.contiguous_format,
    )  # fmt: skip


def learned_word(precision: str, name: str, folder: Path, batch: int) -> Work:
    """Problem 3, Fall 2024: one new row of the text encoder's table, learned through the frozen U-Net."""
    parts = LatentParts.of(folder)
    schedule, device = NoiseSchedule("linear"), parts.unet.device
    config = parts.text_encoder.config
    word = nn.Parameter(torch.zeros(config.hidden_size))

    def step() -> Tensor:
        ids = torch.zeros(batch, config.max_position_embeddings, dtype=torch.long)
        table = parts.text_encoder.get_input_embeddings()
        # The new row is read in one place of every prompt, so the gradient flows back through the whole encoder.
        handle = table.register_forward_hook(lambda module, inputs, output: output + word)
        try:
            with autocast(device, precision):
                context = parts.text_encoder(ids).last_hidden_state
                inputs = batch_of(batch, parts.latent) | {"context": context}
                return diffusion_loss(
                    lambda xt, t, context: parts.unet(xt, t, context).sample, inputs, schedule, "eps", 0.0
                )
        finally:
            handle.remove()

    def predict(pictures: int) -> Tensor:
        rows = 2 * pictures
        context = torch.zeros(rows, config.max_position_embeddings, parts.unet.config.cross_attention_dim)
        with autocast(device, precision):
            return parts.unet(torch.zeros(rows, *parts.latent), torch.full((rows,), 500), context).sample

    def encode(pictures: int) -> None:
        with autocast(device, precision):
            parts.context(1 + pictures)
            parts.vae.decode(torch.zeros(pictures, *parts.latent))

    return Work(name, batch, step, 20, 2, predict, encode, parts.models, [word], host_bytes=3 * parts.pixels**2)


WORK = {
    "p1": digits,
    "p2": lambda precision: faces(precision, "P2: own face U-Net, 64x64", OWN_FACES, 64, 64),
    "p2-course": lambda precision: faces(precision, "P2: the course's U-Net, 256x256", FaceUNetConfig(), 256, 8),
    "p3": lambda precision: circles(precision, "P3: ControlNet, miniature, 128x128", BASE, MINIATURE_HINT_CHANNELS, 64),
    "p3-sd": lambda precision: circles(
        precision, "P3: ControlNet, Stable Diffusion v1, 512x512", SD_V1, (16, 32, 96, 256), 4
    ),
    "p3-2024": lambda precision: learned_word(
        precision, "P3 2024: a learned word, Stable Diffusion v1, 512x512", SD_V1, 4
    ),
}
# Small enough to be timed on a processor; the others are counted only.
MEASURED = ("p1", "p2", "p3")
