"""A small Stable Diffusion that runs anywhere: its scenes, its training, its weights."""

from pathlib import Path

BASE = Path(__file__).resolve().parent / "weights" / "base"
CLIP = Path(__file__).resolve().parent / "weights" / "clip"
