"""Programs called as from a shell, but within the test, and the pictures that they write."""

import numpy as np
from PIL import Image


def parse(program, *arguments):
    """The arguments of a program, whatever they are made of."""
    return program.parse_arguments([str(argument) for argument in arguments])


def run(program, *arguments):
    """What a program's `main` returns."""
    return program.main(parse(program, *arguments))


def read(path):
    """A picture's pixels, (H, W, 3), as integers that can be subtracted."""
    return np.asarray(Image.open(path)).astype(int)
