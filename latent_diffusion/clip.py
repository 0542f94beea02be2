"""CLIP from a local folder: unit vectors of pictures and of texts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers.utils.logging
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from common.cli import UserError, progress
from common.runtime import autocast

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BATCH, TEXTS = 32, 256  # pictures and texts at a time


class Clip:
    """A CLIP model (Radford et al. 2021), such as ViT-B/32's or the project's own.

    The folder has a model, a tokenizer and an image processor in transformers' format; else it is a `UserError`.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", precision: str = "fp32"):
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder; name one with a CLIP model in transformers' format")
        local = {"local_files_only": True}
        try:
            model, info = CLIPModel.from_pretrained(folder, output_loading_info=True, **local)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
            self.processor = CLIPImageProcessor.from_pretrained(folder, **local)
            if info["missing_keys"] or len(self.tokenizer) != model.config.text_config.vocab_size:
                # transformers would go on with random weights, or without the words.
                raise ValueError("weights are missing, or the tokenizer is another model's")
        except Exception as error:  # transformers stumbles in many ways over what is missing: OSError, TypeError, ...
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{folder}: not a CLIP folder in transformers' format ({reason}); name another") from None
        self.model = model.float().eval().to(device)
        self.device, self.precision = torch.device(device), precision

    @torch.inference_mode()
    def embed_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Unit vectors of pictures, uint8 (H, W, 3) each: float32 (N, D) on the CPU."""
        rows = []
        for i in progress(range(0, len(images), BATCH), "CLIP", "part"):
            # Copies, because torch warns of arrays that it may not write to.
            pictures = [image.copy() for image in images[i : i + BATCH]]
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)
            with autocast(self.device, self.precision):
                rows.append(self.model.get_image_features(pixel_values=pixels).pooler_output.float())
        return F.normalize(torch.cat(rows), dim=-1).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts: float32 (N, D) on the CPU. Texts that are too long are cut."""
        longest, rows = self.model.config.text_config.max_position_embeddings, []
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        for i in range(0, len(texts), TEXTS):
            tokens = self.tokenizer(list(texts[i : i + TEXTS]), **options).to(self.device)
            with autocast(self.device, self.precision):
                rows.append(self.model.get_text_features(**tokens).pooler_output.float())
        return F.normalize(torch.cat(rows), dim=-1).cpu()

    def cosines(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        """The cosine of each image, uint8 (H, W, 3), and its prompt."""
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(dim=-1).tolist()
