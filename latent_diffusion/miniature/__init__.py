"""A small Stable Diffusion that runs anywhere: its scenes, its training, its weights."""
