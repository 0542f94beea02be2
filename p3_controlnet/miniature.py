"""A Stable Diffusion small enough for a laptop's processor: the sizes of its parts, and their tokenizer.

The parts are of the classes that Stable Diffusion v1 is made of, so whatever runs one runs the other. Wide images are
given few channels and small grids many: that is where a processor's cores work best.
"""

from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

SIZE = 128  # pixels; the VAE makes a latent of 16x16 of them


def let_colours_pass(vae: AutoencoderKL) -> None:
    """Draw first weights with which the VAE is nearly a line from pixels to latents and back.

    Residual branches start at zero, convolutions that halve or double the grid as the identity, all others keep the
    variance. The two first ones get constants too: a norm then sees more than the colours, and does not take a
    picture's contrast away, which flat pictures hardly recover from otherwise.
    """
    for name, module in vae.named_modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, nn.Conv2d) and "samplers" in name:
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and ("resnets" not in name or "shortcut" in name):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for first in (vae.encoder.conv_in, vae.decoder.conv_in):
        nn.init.normal_(first.bias)


def make_vae(widths: tuple[int, ...] = (8, 16, 64, 64)) -> AutoencoderKL:
    """The VAE, untrained: images (N, 3, 128, 128) to latents (N, 4, 16, 16); 0.9 million parameters.

    Its norms have one group, since each group forgets one brightness and one contrast.
    """
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    let_colours_pass(vae)
    return vae
