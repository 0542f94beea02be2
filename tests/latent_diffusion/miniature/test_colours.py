"""Colour names, CIELAB and CIEDE2000 in their units."""

import numpy as np
from matplotlib.colors import CSS4_COLORS

from latent_diffusion.miniature.colours import COLOURS, ciede2000, colour_named, rgb_to_lab


def test_colours_are_of_255_and_differences_broadcast():
    assert np.abs(rgb_to_lab([[255, 0, 0], [128, 128, 128]]) - [[53.24, 80.09, 67.20], [53.59, 0, 0]]).max() < 0.01
    # Sharma, Wu and Dalal 2005, table 1, rows 17 to 19.
    others = [[73, 25, -18], [61, -5, 29], [56, -27, -3]]
    assert np.abs(ciede2000([50, 2.5, 0], others) - [27.1492, 22.8977, 31.9030]).max() < 5.1e-5


def test_colours_are_all_of_css_once_each():
    css = {name: tuple(int(value[i : i + 2], 16) for i in (1, 3, 5)) for name, value in CSS4_COLORS.items()}
    second = {name for name in css if "grey" in name} | {"aqua", "fuchsia"}
    assert {name.replace(" ", ""): rgb for name, rgb in COLOURS.items()} == {
        name: rgb for name, rgb in css.items() if name not in second
    }
    assert len(set(COLOURS.values())) == len(COLOURS) == 139
    assert {"pale golden rod", "light sea green", "medium violet red", "old lace"} < set(COLOURS)


def test_every_css_name_is_known_however_it_is_spaced():
    assert colour_named("aqua") == COLOURS["cyan"]
    assert colour_named("Dark Slate Grey") == COLOURS["dark slate gray"]
    assert colour_named("palegolden rod") == COLOURS["pale golden rod"]
    assert [colour_named(name) for name in ("", "reddish", "#ff0000", "rgb(1,2,3)")] == [None] * 4
