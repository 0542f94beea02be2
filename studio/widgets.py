"""What the tabs are made of: the look, the buttons, and events that draw. Only this and `tabs` import Gradio."""

import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from common.cli import UserError
from studio.markup import complaint, line
from studio.parts import Status

# The functions check what comes from the page; Gradio would answer an emptied slider with a traceback.
UNCHECKED = {"preprocess": False, "show_progress": "hidden"}

# Small answers while a slider moves: not queued behind a drawing, and only the last position counts. No event may have
# two of them: when the turn of a deferred one comes, Gradio 6 runs all functions of its event again, and two that defer
# each other never end.
AT_ONCE = {**UNCHECKED, "concurrency_limit": None, "trigger_mode": "always_last"}


def theme() -> gr.themes.Base:
    """Colours, and fonts that the machine has."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="indigo", **fonts)


def told(draw: Callable[..., Iterator[tuple]], outputs: int) -> Callable[..., Iterator[tuple]]:
    """A drawing function as the page wants it: its status as HTML, and mistakes in place of the status.

    Args:
        draw: yields `outputs` values, the last of them a `Status`.
        outputs: how many.
    """

    def handler(*inputs: Any) -> Iterator[tuple]:
        unchanged = [gr.skip()] * (outputs - 1)
        yield *unchanged, line(Status("starting", 0, 1))
        try:
            for *values, status in draw(*inputs):
                yield *values, line(status)
        except UserError as error:
            yield *unchanged, complaint(str(error))
        except Exception as error:  # whatever it is, the page must not wait for ever
            traceback.print_exc(file=sys.stderr)
            yield *unchanged, complaint(f"{type(error).__name__}: {error} (more in the terminal)")

    return handler


def drawing(triggers: list[Callable], draw: Callable, inputs: list, outputs: list, stop: gr.Button) -> Any:
    """Let events draw; drawings take turns, since each wants all cores. Returns the event."""
    event = gr.on(
        triggers, told(draw, len(outputs)), inputs, outputs,
        concurrency_id="drawing", concurrency_limit=1, **UNCHECKED,
    )  # fmt: skip
    stop.click(lambda: line(Status("Stopped.")), None, outputs[-1], cancels=[event], show_progress="hidden")
    return event


def buttons(name: str) -> tuple[gr.Button, gr.Button, gr.HTML]:
    """The buttons of a tab, draw and stop, and under them its status."""
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", scale=3, min_width=60, elem_id=f"{name}-draw")
        stop = gr.Button("Stop", scale=1, min_width=60, elem_id=f"{name}-stop")
    return draw, stop, gr.HTML(line(), elem_id=f"{name}-status")
