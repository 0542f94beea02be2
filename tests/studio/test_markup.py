"""What comes from outside is text in the page, never markup; pictures come along whole."""

import base64
import io
import re

import numpy as np
from PIL import Image

from studio.markup import complaint, figure, line, notice
from studio.parts import Status

NASTY = '<img src=x onerror="alert(1)">'


def test_text_is_escaped():
    for markup in (figure(NASTY), figure(NASTY, Image.new("RGB", (2, 2))), line(Status(NASTY)), complaint(NASTY)):
        assert NASTY not in markup
        assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in markup
    assert NASTY not in notice(NASTY)
    assert notice("") == ""


def test_a_figure_carries_its_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    markup = figure("noise", Image.fromarray(pixels))
    data = re.search(r'src="data:image/png;base64,([^"]+)"', markup)[1]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)
    assert "<img" not in figure("nothing yet")


def test_a_bar_only_while_something_is_drawn():
    assert '<progress value="3" max="8">' in line(Status("step 3 of 8", 3, 8))
    assert "progress" not in line(Status("Done."))
