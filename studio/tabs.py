"""The studio in the browser: every tab's controls, figures and events. Only this file imports Gradio."""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import gradio as gr

from common.cli import UserError
from studio.pages import Circles, Digits, Faces, show_moment
from studio.parts import Control, Figures, Page, Values, complaint, figure, line, notice

# The functions check what comes from the page; Gradio would answer an emptied slider with a traceback.
UNCHECKED = {"preprocess": False, "show_progress": "hidden"}
# Small answers while a slider moves: not queued behind a drawing, and only the last position counts. No event may have
# two of them: when the turn of a deferred one comes, Gradio 6 runs all functions of its event again, and two that defer
# each other never end.
AT_ONCE = {**UNCHECKED, "concurrency_limit": None, "trigger_mode": "always_last"}
CLICK = """element.addEventListener("click", event => {
    const box = element.querySelector("img").getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    trigger("click", {x: 100 * x, y: 100 * y});
})"""  # in per cent of the picture
CSS = Path(__file__).with_name("style.css").read_text()
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # that the machine has
THEME = gr.themes.Default(primary_hue="indigo", **FONTS)
Changes = dict[gr.Component, Any]


def make_component(control: Control, place: str) -> gr.Component:
    """A control in the page, with `place` as its id."""
    about = {"value": control.value, "label": control.label, "elem_id": place, "min_width": 130}
    if control.options:
        return (gr.Radio if len(control.options) < 4 else gr.Dropdown)(list(control.options), **about)
    if control.high is None:
        return gr.Textbox(lines=2, **about)
    if control.typed:
        return gr.Number(precision=0, **about)
    return gr.Slider(control.low, control.high, step=control.step, **about)


class Tab:
    """A page's tab: on the left buttons, their status, what is told of controls, and these; figures on the right."""

    def __init__(self, page: Page, blocks: gr.Blocks):
        self.page, self.blocks, self.controls = page, blocks, {}
        with gr.Tab(page.title):
            self.note = self.html("note")
            gr.Markdown(page.text)
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    with gr.Row():
                        self.button = gr.Button("Draw", elem_id=f"{page.name}-draw", variant="primary", min_width=150)
                        self.stop = gr.Button("Stop", elem_id=f"{page.name}-stop", min_width=60)
                    self.status, self.told = self.html("status", line()), self.html("told")
                    for row in page.controls:
                        with gr.Row():
                            for name, control in row.items():
                                self.controls[name] = make_component(control, f"{page.name}-{name}")
                with gr.Column(scale=3) as self.right, gr.Row() as self.row:
                    self.figures = [self.html(caption.split()[0], figure(caption)) for caption in page.figures]

    def html(self, place: str, content: str = "", **options: Any) -> gr.HTML:
        """A place for HTML."""
        return gr.HTML(content, elem_id=f"{self.page.name}-{place}", min_width=120, **options)

    def show(self, figures: Figures) -> Changes:
        """Captions and pictures in the places of the tab's figures."""
        return {place: figure(*shown) for place, shown in zip(self.figures, figures)}

    def draw_on(self, *triggers: Callable, show: Callable | None = None, more: Sequence[gr.Component] = ()) -> None:
        """Draw on the button and other events; `show` is from what the page yields to changes of figures and `more`."""

        def draw(*inputs: Any) -> Iterator[Changes]:
            yield {self.status: line("starting", 0, 1)}
            try:
                for shown, status in self.page.draw(dict(zip(self.controls, inputs))):
                    yield (show or self.show)(shown) | {self.status: status}
            except UserError as error:
                yield {self.status: complaint(error)}
            except Exception as error:  # whatever it is, the page must not wait for ever
                traceback.print_exc(file=sys.stderr)
                yield {self.status: complaint(f"{type(error).__name__}: {error} (more in the terminal)")}

        inputs, outputs = [*self.controls.values()], [*self.figures, *more, self.status]
        turns = {"concurrency_id": "drawing", "concurrency_limit": 1}  # since each wants all cores
        event = gr.on([self.button.click, *triggers], draw, inputs, outputs, **turns, **UNCHECKED)

        def tell_stopped() -> str:
            sleep(0.5)  # so that a step that is on its way is not shown over it
            return line("Stopped.")

        self.stop.click(tell_stopped, None, self.status, cancels=[event], show_progress="hidden")
        for trigger in (self.blocks.load, event.then):
            self.answer(trigger, lambda *_: {self.note: notice(self.page.note())}, self.note)

    def answer(self, on: Callable, change: Callable, told: gr.HTML, *more: gr.Component) -> None:
        """Answer events at once: `change` is from one and the live controls' values to changes of these and more."""
        names = [name for row in self.page.live for name in row]

        def change_or_tell(event: gr.EventData, *inputs: Any) -> Changes:
            try:
                return {told: ""} | change(event, dict(zip(names, inputs)))
            except UserError as error:
                return {told: complaint(error)}

        live = [self.controls[name] for name in names]
        on(change_or_tell, live, [told, *live, *more], **AT_ONCE)


def add_digits(page: Digits, blocks: gr.Blocks) -> None:
    """The tab, with a slider over the reverse process."""
    tab, kept = Tab(page, blocks), gr.State(time_to_live=3600)
    with tab.right:
        position = gr.Slider(0, 10, 0, step=1, label="reverse process: from noise to image", elem_id="digits-walk")

    def drawn(moments: list) -> Changes:
        last = len(moments) - 1
        slider = gr.Slider(value=last, maximum=max(1, last))
        return tab.show(show_moment(moments, last)) | {kept: moments, position: slider}

    def walk(moments: list | None, position: float) -> Changes:
        return tab.show(show_moment(moments, position)) if moments else {}

    tab.draw_on(show=drawn, more=[kept, position])
    position.input(walk, [kept, position], tab.figures, **AT_ONCE)


def add_faces(page: Faces, blocks: gr.Blocks) -> None:
    """The tab, with the lengths of the noises."""
    tab, caption = Tab(page, blocks), "|xT| on both ways"
    with tab.right:
        plot = tab.html("plot", figure(caption))

    def measure(_: gr.EventData, values: Values) -> Changes:
        told, picture = page.preview(values)
        return {tab.told: line(told), plot: figure(caption, picture)}

    alpha, *noises = (tab.controls[name] for name in ("alpha", "noise1", "noise2"))
    tab.draw_on(alpha.release)
    tab.answer(partial(gr.on, [blocks.load, alpha.input, *(n.change for n in noises)]), measure, tab.told, plot)


def add_circles(page: Circles, blocks: gr.Blocks) -> None:
    """The tab, with outlines to click into. A prompt of one's own stays until colours change, or their order."""
    tab, sentence = Tab(page, blocks), gr.State("")
    with tab.row:
        outlines = tab.html("outlines", figure("outlines"), js_on_load=CLICK)
    changes = [tab.controls[name].change for row in page.live for name in row]

    def outline(_: gr.EventData, values: Values) -> Changes:
        found, picture = page.preview(values)
        return {outlines: figure("outlines: click to place", picture), sentence: found}

    def put(event: gr.EventData, values: Values) -> Changes:
        return {tab.controls[name]: value for name, value in page.move_nearest(values, event.x, event.y).items()}

    tab.draw_on()
    tab.answer(partial(gr.on, [blocks.load, *changes]), outline, tab.told, outlines, sentence)
    tab.answer(outlines.click, put, tab.told)
    guidance, prompt = tab.controls["guidance_scale"], tab.controls["prompt"]
    tab.answer(blocks.load, lambda *_: {guidance: page.sampler()[1].scale}, tab.note, guidance)
    sentence.change(lambda found: found, sentence, prompt, **AT_ONCE)


def make_page(digits: Digits, faces: Faces, circles: Circles, words: Page) -> gr.Blocks:
    """The whole page."""
    with gr.Blocks(title="Diffusion studio", analytics_enabled=False) as blocks:
        gr.Markdown("# Diffusion studio")
        add_digits(digits, blocks)
        add_faces(faces, blocks)
        add_circles(circles, blocks)
        Tab(words, blocks).draw_on()
    return blocks
