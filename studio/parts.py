"""What the pages share: what they show as HTML, controls that check values, weights that are read once, and `Page`."""

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from threading import RLock
from typing import Any

from PIL.Image import Image

from common.cli import UserError

Values = Mapping[str, Any]  # of controls, by name
Figures = list[tuple[str, Image]]  # captions and pictures


def figure(caption: str, picture: Image | None = None) -> str:
    """A caption and under it a picture, smooth from 512 pixels on when it is enlarged, or an empty frame."""
    inner = '<div class="empty"></div>'
    if picture is not None:
        file = io.BytesIO()
        picture.save(file, format="PNG")
        data, kind = base64.b64encode(file.getvalue()).decode(), "smooth" if picture.width >= 512 else "sharp"
        inner = f'<img class="{kind}" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f'<figure class="studio-figure"><figcaption>{escape(caption)}</figcaption>{inner}</figure>'


def line(text: str = "", done: int = 0, total: int = 0) -> str:
    """A line of text, with a bar where `total` steps are being done."""
    bar = f'<progress value="{done}" max="{total}"></progress>' if total else ""
    return f'<div class="studio-line" role="status">{bar}<span>{escape(text)}</span></div>'


def complaint(message: object) -> str:
    """What went wrong."""
    return f'<div class="studio-complaint" role="alert">{escape(str(message))}</div>'


def notice(text: str) -> str:
    """Something to know before one begins; "" for nothing."""
    return f'<div class="studio-notice" role="note">{escape(text)}</div>' if text else ""


@dataclass(frozen=True)
class Control:
    """Something to set: one of `options`; or a number from `low` to `high`, whole if the step is 1; or else a text."""

    label: str
    value: Any
    low: float = 0
    high: float | None = None
    step: float = 1
    options: Sequence[Any] = ()
    typed: bool = False  # a number's field in place of a slider

    def check(self, value: Any) -> Any:
        """The value, a text in one line; a `UserError` where it does not fit, such as the None of an emptied field."""
        found = f"{self.label} {'is empty' if value is None else value}"
        if self.options:
            if value not in self.options:
                raise UserError(f"{found}: choose {', '.join(map(str, self.options))}")
            return value
        if self.high is None:
            return " ".join(str(value or "").split())
        finite = isinstance(value, int | float) and math.isfinite(value)
        if not finite or not self.low <= value <= self.high:
            raise UserError(f"{found}: choose from {self.low} to {self.high}")
        if self.step == 1 and value != int(value):
            raise UserError(f"{found}: choose a whole number")
        return int(value) if self.step == 1 else float(value)


Row = Mapping[str, Control]  # controls that stand beside each other, by name


def drawing_controls(options: type, most_steps: int, **defaults: Any) -> list[Row]:
    """Controls for what all samplers' options have; `defaults` differ from those of the dataclass `options`."""
    default = {item.name: item.default for item in fields(options)} | defaults
    choices = {item.name: item.metadata.get("choices", ()) for item in fields(options)}
    return [
        {"guidance_scale": Control("guidance", default["guidance_scale"], 0, 15, step=0.5)},
        {"steps": Control("steps", default["steps"], 1, most_steps)},
        {"sampler": Control("sampler", default["sampler"], options=choices["sampler"])},
        {"seed": Control("seed", default["seed"], 0, 2**31 - 1, typed=True)},
    ]


class Kept:
    """What `make` makes of paths: made when first asked for, and anew when a file has changed since."""

    reading = RLock()  # for all of them: transformers patches torch's functions while it makes a model

    def __init__(self, make: Callable):
        self.make, self.key = make, None

    def __call__(self, *paths: Path) -> Any:
        files = [file for path in paths for file in (path, *sorted(path.rglob("*")))]
        key = paths, [(file, file.stat().st_mtime_ns) for file in files if file.exists()]
        with self.reading:
            if key != self.key:
                self.value, self.key = self.make(*paths), key
            return self.value


class Page:
    """What stands behind a tab. Controls that are named as fields of a sampler's options become these."""

    name: str  # begins the ids of its parts
    title: str
    text: str  # what there is to see
    controls: Sequence[Row]
    live: Sequence[Row] = ()  # those whose changes are answered at once
    figures: Sequence[str]  # captions while nothing is drawn
    unit = "step", "steps"  # what progress counts, and the control that says how many there are

    def note(self) -> str:
        """What to know before one draws; "" for nothing. A `UserError` where weights are missing or broken."""
        return ""

    def steps(self, values: Values) -> Iterator[Any]:
        """Draw checked values: yield `Figures` in every step, or what the tab makes them of; may raise `UserError`."""
        raise NotImplementedError

    def remark(self, values: Values) -> str:
        """What to say of a finished drawing."""
        return ""

    def check(self, values: Values) -> dict[str, Any]:
        """The given controls' values, checked; a `UserError` for the first that cannot be used."""
        return {n: control.check(values[n]) for row in self.controls for n, control in row.items() if n in values}

    def draw(self, values: Values) -> Iterator[tuple[Any, str]]:
        """Check and draw: yields what `steps` yields, each with a line of HTML on how far it is; raises as `steps`."""
        values, (unit, count) = self.check(values), self.unit
        for done, shown in enumerate(self.steps(values), start=1):
            yield shown, line(f"{unit} {done} of {values[count]}", done, values[count])
        yield shown, line(f"Done. {self.remark(values)}".strip())
