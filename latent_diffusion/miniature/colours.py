"""Named colours, CIELAB, and how different two colours look."""

import numpy as np
from PIL import ImageColor
from skimage.color import deltaE_ciede2000, rgb2lab

# The CSS names as the course spaces them; of two names of one colour only one (gray, cyan, magenta).
NAMES = (
    "alice blue, antique white, aquamarine, azure, beige, bisque, black, blanched almond, blue, blue violet, brown, "
    "burly wood, cadet blue, chartreuse, chocolate, coral, cornflower blue, cornsilk, crimson, cyan, dark blue, "
    "dark cyan, dark golden rod, dark gray, dark green, dark khaki, dark magenta, dark olive green, dark orange, "
    "dark orchid, dark red, dark salmon, dark sea green, dark slate blue, dark slate gray, dark turquoise, "
    "dark violet, deep pink, deep sky blue, dim gray, dodger blue, fire brick, floral white, forest green, gainsboro, "
    "ghost white, gold, golden rod, gray, green, green yellow, honey dew, hot pink, indian red, indigo, ivory, khaki, "
    "lavender, lavender blush, lawn green, lemon chiffon, light blue, light coral, light cyan, "
    "light golden rod yellow, light gray, light green, light pink, light salmon, light sea green, light sky blue, "
    "light slate gray, light steel blue, light yellow, lime, lime green, linen, magenta, maroon, medium aqua marine, "
    "medium blue, medium orchid, medium purple, medium sea green, medium slate blue, medium spring green, "
    "medium turquoise, medium violet red, midnight blue, mint cream, misty rose, moccasin, navajo white, navy, "
    "old lace, olive, olive drab, orange, orange red, orchid, pale golden rod, pale green, pale turquoise, "
    "pale violet red, papaya whip, peach puff, peru, pink, plum, powder blue, purple, rebecca purple, red, "
    "rosy brown, royal blue, saddle brown, salmon, sandy brown, sea green, sea shell, sienna, silver, sky blue, "
    "slate blue, slate gray, snow, spring green, steel blue, tan, teal, thistle, tomato, turquoise, violet, wheat, "
    "white, white smoke, yellow, yellow green"
).split(", ")
COLOURS: dict[str, tuple[int, int, int]] = {name: ImageColor.getrgb(name.replace(" ", "")) for name in NAMES}


def colour_named(name: str) -> tuple[int, int, int] | None:
    """The sRGB value, 0 to 255, of any CSS colour name however it is spaced; None if there is no such name."""
    joined = name.replace(" ", "").lower()
    return ImageColor.getrgb(joined) if joined in ImageColor.colormap else None


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB under D65 of sRGB colours (..., 3), 0 to 255: float64 (..., 3), L* from 0 to 100, a* and b*."""
    return rgb2lab(np.asarray(rgb, dtype=np.float64) / 255)


def ciede2000(lab1: np.ndarray, lab2: np.ndarray) -> np.ndarray:
    """How different two colours look: CIEDE2000 (Sharma et al. 2005); about 1 can just be seen.

    From CIELAB colours (..., 3), whose shapes broadcast, to float64 (...).
    """
    return deltaE_ciede2000(*np.broadcast_arrays(lab1, lab2))
