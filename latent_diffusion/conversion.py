"""Names of Stable Diffusion's weights: from those of diffusers and transformers to those of the original files.

Both count layers in their own way: diffusers by level and kind, the original in one row from input to middle to output.
"""

import re
from collections.abc import Iterable

RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def highest(names: Iterable[str], pattern: str) -> int:
    """The highest number that the pattern's one group finds in the names; -1 if there is none."""
    return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def original_unet_names(names: Iterable[str]) -> dict[str, str]:
    """For every weight of a `UNet2DConditionModel` or `ControlNetModel` its original name, without `model.` and such.

    Args:
        names: all names of the model, since the original's count goes over all levels.
    """
    names = set(names)
    step = highest(names, r"down_blocks\.0\.resnets\.(\d+)") + 2  # layers of a level, and its change of size
    hint_end = 2 * (highest(names, r"controlnet_cond_embedding\.blocks\.(\d+)") + 2)

    def place(name: str) -> str:
        module, _, kind = name.rpartition(".")
        if module in UNET_ENDS:
            return f"{UNET_ENDS[module]}.{kind}"
        if module == "controlnet_cond_embedding.conv_out":
            return f"input_hint_block.{hint_end}.{kind}"
        if found := re.fullmatch(r"controlnet_(down_blocks|cond_embedding\.blocks)\.(\d+)", module):
            k = int(found[2])
            return f"zero_convs.{k}.0.{kind}" if found[1] == "down_blocks" else f"input_hint_block.{2 * k + 2}.{kind}"
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            what, k, rest = found[1], int(found[2]), found[3]
            return f"middle_block.{2 * k + (what == 'attentions')}.{inner(what, rest)}"
        found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
        if not found:
            return name  # of no known model; whoever compares will see it
        side, level, what, k, rest = found.groups()
        row, first = int(level) * step, 1 if side == "down" else 0
        if what == "downsamplers":
            return f"input_blocks.{row + step}.0.op.{kind}"
        if what == "upsamplers":
            attended = any(other.startswith(f"up_blocks.{level}.attentions.") for other in names)
            return f"output_blocks.{row + step - 1}.{1 + attended}.conv.{kind}"
        blocks = "input_blocks" if side == "down" else "output_blocks"
        return f"{blocks}.{row + first + int(k)}.{int(what == 'attentions')}.{inner(what, rest)}"

    def inner(what: str, rest: str) -> str:
        module, _, kind = rest.rpartition(".")
        return f"{RESIDUAL_BLOCK.get(module, module)}.{kind}" if what == "resnets" else rest

    return {name: place(name) for name in names}


def original_vae_names(names: Iterable[str]) -> dict[str, str]:
    """For every weight of an `AutoencoderKL` its original name, without `first_stage_model.`."""
    names = set(names)
    last = highest(names, r"decoder\.up_blocks\.(\d+)")

    def place(name: str) -> str:
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
            return f"{found[1]}.mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
        if found := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", name):
            return f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
        if found := re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d+)\.(.+)", name):
            half, side, level, rest = found[1], found[2], int(found[3]), found[4]
            rest = rest.replace("resnets.", "block.").replace(f"{side}samplers.0.", f"{side}sample.")
            return f"{half}.{side}.{level if side == 'down' else last - level}.{rest}"
        return name

    return {name: place(name) for name in names}


def original_text_names(names: Iterable[str]) -> dict[str, str]:
    """For every weight of a `CLIPTextModel` its original name, without `cond_stage_model.transformer.`.

    The `text_model.` in front comes and goes between versions of transformers.
    """
    return {name: f"text_model.{name.removeprefix('text_model.')}" for name in names}
