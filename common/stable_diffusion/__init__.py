"""Stable Diffusion v1 as a frozen base: read from a folder or the published single file, offline."""
