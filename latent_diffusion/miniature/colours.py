"""Named colours, CIELAB, and how different two colours look."""

import numpy as np
from PIL import ImageColor

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

# IEC 61966-2-1: linear sRGB to XYZ; a row's sum is the white point D65.
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def colour_named(name: str) -> tuple[int, int, int] | None:
    """The sRGB value, 0 to 255, of any CSS colour name however it is spaced; None if there is no such name."""
    joined = name.replace(" ", "").lower()
    return ImageColor.getrgb(joined) if joined in ImageColor.colormap else None


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB under D65 of sRGB colours.

    Args:
        rgb: (..., 3), 0 to 255.

    Returns:
        float64 (..., 3): L* from 0 to 100, a* and b*.
    """
    unit = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    relative = linear @ (XYZ / XYZ.sum(axis=1, keepdims=True)).T
    f = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ciede2000(lab1: np.ndarray, lab2: np.ndarray) -> np.ndarray:
    """How different two colours look: CIEDE2000 with all parametric factors 1; about 1 can just be seen.

    Sharma, Wu and Dalal 2005, "The CIEDE2000 color-difference formula: implementation notes, supplementary test data,
    and mathematical observations", equations 2 to 22.

    Args:
        lab1, lab2: CIELAB colours (..., 3), shapes that broadcast.

    Returns:
        float64 (...).
    """
    (l1, a1, b1), (l2, a2, b2) = (np.moveaxis(np.asarray(lab, dtype=np.float64), -1, 0) for lab in (lab1, lab2))
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(c7 / (c7 + 25.0**7))
    a1, a2 = a1 * stretch, a2 * stretch
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, a)) % 360 for a, b in ((a1, b1), (a2, b2)))

    gray = c1 * c2 == 0  # a colour without chroma has no hue
    turn = np.where(gray, 0, (h2 - h1 + 180) % 360 - 180)
    # At exactly half a turn the paper keeps the sign of h2 - h1; only the sine of the half angle is used, squared
    # except in the last product.
    turn = np.where((turn == -180) & (h2 > h1), 180, turn)
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))

    lightness, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    middle = (h1 + h2) / 2 + np.where(np.abs(h1 - h2) > 180, np.where(h1 + h2 < 360, 180, -180), 0)
    hue = np.radians(np.where(gray, h1 + h2, middle))
    weight = 1 - 0.17 * np.cos(hue - np.pi / 6) + 0.24 * np.cos(2 * hue)
    weight += 0.32 * np.cos(3 * hue + np.radians(6)) - 0.20 * np.cos(4 * hue - np.radians(63))
    offset = (lightness - 50) ** 2
    sl = 1 + 0.015 * offset / np.sqrt(20 + offset)
    sc, sh = 1 + 0.045 * chroma, 1 + 0.015 * chroma * weight
    rotation = np.radians(30 * np.exp(-(((np.degrees(hue) - 275) / 25) ** 2)))
    rt = -2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * np.sin(2 * rotation)
    l, c, h = dl / sl, dc / sc, dh / sh  # noqa: E741
    return np.sqrt(l**2 + c**2 + h**2 + rt * c * h)
