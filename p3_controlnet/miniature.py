"""A Stable Diffusion small enough for a laptop's processor: the sizes of its parts, and their tokenizer.

The parts are of the classes that Stable Diffusion v1 is made of, so whatever runs one runs the other. Wide images are
given few channels and small grids many: that is where a processor's cores work best.
"""

from diffusers import AutoencoderKL

SIZE = 128  # pixels; the VAE makes a latent of 16x16 of them


def make_vae() -> AutoencoderKL:
    """The VAE, untrained: images (N, 3, 128, 128) to latents (N, 4, 16, 16); 0.9 million parameters."""
    widths = (8, 16, 64, 64)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
