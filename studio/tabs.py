"""The studio's page, tab by tab: what can be set, what is shown, and which function answers."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from common.cli import UserError
from common.sampling import METHODS
from latent_diffusion.drawing import SAMPLERS
from latent_diffusion.miniature.colours import COLOURS
from p1_ddpm.digits import DOMAINS
from studio import circles as circle_page
from studio import digits as digit_page
from studio import faces as face_page
from studio import words as word_page
from studio.circles import Circles
from studio.digits import Digits
from studio.faces import Faces
from studio.markup import complaint, figure, notice
from studio.widgets import AT_ONCE, buttons, drawing
from studio.words import Words

CLICK = """element.addEventListener("click", event => {
    const box = element.querySelector("img").getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    trigger("click", {x: 100 * x, y: 100 * y});
})"""  # in per cent of the picture
FIRST_PLACES, FIRST_COLOURS = [(33, 45, 20), (72, 60, 15)], ["gold", "navy", "pink"]


def digits_tab(digits: Digits) -> None:
    """One digit several times, and a slider over the way there."""
    try:
        domains = digits.domains()
    except UserError:  # it is told when one draws
        domains = DOMAINS

    def shown(moments: list[digit_page.Moment], position: float) -> list[str]:
        return [figure(*shown) for shown in digit_page.show(moments, position)]

    def draw(*inputs: Any) -> Iterator[tuple]:
        for moments, status in digits.draw(*inputs):
            last = len(moments) - 1
            yield moments, *shown(moments, last), gr.Slider(value=last, maximum=max(1, last)), status

    def walk(moments: list[digit_page.Moment] | None, position: float) -> tuple:
        return shown(moments, position) if moments else (gr.skip(), gr.skip())

    moments = gr.State(time_to_live=3600)
    gr.Markdown(
        "A digit drawn several times from different noises. Guidance 1 is off; more makes the digit surer and the"
        " pictures more alike."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            with gr.Row():
                domain = gr.Dropdown(list(domains), value=next(iter(domains)), label="domain", min_width=100)
                label = gr.Dropdown(list(range(max(domains.values()))), value=7, label="digit", min_width=100)
            guidance = gr.Slider(0, digit_page.MOST_GUIDANCE, 6, step=0.5, label="guidance")
            steps = gr.Slider(1, digit_page.MOST_STEPS, 10, step=1, label="steps")
            method = gr.Radio(METHODS, value="dpm-solver++", label="sampler")
            count = gr.Slider(1, digit_page.MOST_DIGITS, 8, step=1, label="images")
            seed = gr.Number(0, label="seed", precision=0)
            button, stop, status = buttons("digits")
        with gr.Column(scale=3):
            with gr.Row():
                xt = gr.HTML(figure("xt"), elem_id="digits-xt")
                x0 = gr.HTML(figure("the x0 predicted from it"), elem_id="digits-x0")
            position = gr.Slider(0, 10, 0, step=1, label="reverse process: from noise to image", elem_id="digits-walk")
    inputs = [domain, label, count, guidance, method, steps, seed]
    drawing([button.click], draw, inputs, [moments, xt, x0, position, status], stop)
    position.input(walk, [moments, position], [xt, x0], **AT_ONCE)


def faces_tab(faces: Faces, page: gr.Blocks) -> None:
    """Two faces, those between them on the sphere and on the line, and how long the noises are."""
    names = "first", "slerp", "lerp", "second"

    def draw(*inputs: Any) -> Iterator[tuple]:
        found = faces.lengths(*inputs[:3])
        captions = "first", f"slerp: |xT| = {found.slerp:.1f}", f"lerp: |xT| = {found.lerp:.1f}", "second"
        for *pictures, status in faces.draw(*inputs):
            yield *map(figure, captions, pictures), status

    def lengths(*inputs: Any) -> tuple:
        try:
            found = faces.lengths(*inputs)
        except UserError as error:
            return gr.skip(), complaint(str(error))
        rows = f"| slerp | {found.slerp:.1f} |\n| lerp | {found.lerp:.1f} |\n| √D | {found.shell:.1f} |"
        return f"| at this alpha | &#124;xT&#124; |\n|---|---|\n{rows}", ""

    def other_ends(first: Any, second: Any, alpha: Any) -> tuple:
        try:
            picture = figure("|xT| on both ways", faces.plot(first, second), smooth=True)
        except UserError:  # `lengths` tells it
            picture = gr.skip()
        return *lengths(first, second, alpha), picture

    word = gr.HTML(elem_id="faces-notice")
    gr.Markdown(
        "Gaussian noise of D values has length √D, almost exactly. Slerp, the great circle between two noises, keeps"
        " that length; lerp, the straight line, cuts through the sphere, and the network has never seen noise so short."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            with gr.Row():
                first = gr.Number(0, label="first noise", precision=0, min_width=100)
                second = gr.Number(1, label="second noise", precision=0, min_width=100)
            alpha = gr.Slider(0, 1, 0.5, step=0.01, label="alpha", elem_id="faces-alpha")
            steps = gr.Slider(1, face_page.MOST_STEPS, 20, step=1, label="steps (DDIM, eta 0)")
            button, stop, status = buttons("faces")
            table, told = gr.Markdown(elem_id="faces-lengths"), gr.HTML(elem_id="faces-told")
        with gr.Column(scale=3):
            with gr.Row():
                pictures = [gr.HTML(figure(name), elem_id=f"faces-{name}", min_width=120) for name in names]
            lengths_plot = gr.HTML(figure("|xT| on both ways"), elem_id="faces-plot")
    between, ends = [first, second, alpha], [first.change, second.change]
    drawn = drawing([button.click, alpha.release], draw, [*between, steps], [*pictures, status], stop)
    alpha.input(lengths, between, [table, told], **AT_ONCE)
    gr.on([page.load, *ends], other_ends, between, [table, told, lengths_plot], **AT_ONCE)
    for trigger in (page.load, drawn.then):
        trigger(lambda: notice(faces.missing()), None, word, **AT_ONCE)


def circles_tab(circles: Circles, page: gr.Blocks) -> None:
    """One circle or two, a prompt, and what the ControlNet makes of them."""

    def places(two: bool, *numbers: Any) -> list[circle_page.Place]:
        return [numbers[:3], numbers[3:]][: 2 if two else 1]

    def sentence(two: bool, *inputs: Any) -> str:
        *numbers, first, second, background = inputs
        return circle_page.sentence(places(two, *numbers), [first, second][: 1 + two], background)

    def move(prompt: str, own: str, *inputs: Any) -> tuple:
        """Circles that change places change the order of their colours, unless the prompt is the user's own."""
        try:
            picture, found = circle_page.hint(places(*inputs[:-3])), sentence(*inputs)
        except UserError as error:
            return *[gr.skip()] * 3, complaint(str(error))
        if prompt != own:
            found = gr.skip()
        return figure("outlines: click to place", picture, smooth=True), found, found, ""

    def write(*inputs: Any) -> tuple:
        try:
            found = sentence(*inputs)
        except UserError as error:
            return gr.skip(), gr.skip(), complaint(str(error))
        return found, found, ""

    def put(event: gr.EventData, two: bool, *numbers: Any) -> tuple:
        try:
            moved = circle_page.moved(places(two, *numbers), round(event.x), round(event.y))
        except UserError as error:
            return *[gr.skip()] * len(numbers), complaint(str(error))
        return *[value for place in moved for value in place], *numbers[3 * len(moved) :], ""

    def draw(*inputs: Any) -> Iterator[tuple]:
        *where, prompt, strength, guidance, method, steps, seed = inputs
        for picture, status in circles.draw(places(*where), prompt, strength, guidance, method, steps, seed):
            yield figure("picture", picture), status

    def own_guidance() -> Any:
        try:
            return circles.sampler()[1].scale
        except UserError:  # it is told when one draws
            return gr.skip()

    gr.Markdown(
        "The outlines say where, the prompt says in which colours. Click into the outlines to move the nearest circle"
        " there, or use the sliders, which are in"
        " per cent of the side. Strength 0 leaves the outlines out."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            numbers, colours = [], []
            two = gr.Checkbox(True, label="a second circle")
            with gr.Row():
                for k, place in enumerate(FIRST_PLACES):
                    with gr.Column(min_width=150), gr.Group(elem_id=f"circle-{k + 1}"):
                        for name, value, low, high in zip(("x", "y", "radius"), place, (0, 0, 5), (100, 100, 45)):
                            numbers.append(gr.Slider(low, high, value, step=1, label=name))
                        colours.append(gr.Dropdown(list(COLOURS), value=FIRST_COLOURS[k], label="colour"))
            colours.append(gr.Dropdown(list(COLOURS), value=FIRST_COLOURS[-1], label="background"))
        with gr.Column(scale=1, min_width=300):
            hint = gr.HTML(figure("outlines"), elem_id="circles-hint", js_on_load=CLICK)
            own = gr.State(circle_page.sentence(FIRST_PLACES, FIRST_COLOURS[:2], FIRST_COLOURS[-1]))
            prompt = gr.Textbox(own.value, label="prompt", elem_id="circles-prompt", lines=2)
            strength = gr.Slider(0, circle_page.MOST_STRENGTH, 1, step=0.05, label="strength of the control")
            told = gr.HTML(elem_id="circles-told")
        with gr.Column(scale=1, min_width=300):
            drawn = gr.HTML(figure("picture"), elem_id="circles-picture")
            button, stop, status = buttons("circles")
            with gr.Accordion("guidance, steps, sampler, seed", open=False):
                guidance = gr.Slider(0, circle_page.MOST_GUIDANCE, 2, step=0.5, label="guidance")
                steps = gr.Slider(1, circle_page.MOST_STEPS, 10, step=1, label="steps")
                method = gr.Radio(SAMPLERS, value="dpm-solver++", label="sampler")
                seed = gr.Number(0, label="seed", precision=0)
    where, wording = [two, *numbers], [prompt, own, told]
    described, moves = [*where, *colours], [part.change for part in where]
    drawing([button.click], draw, [*where, prompt, strength, guidance, method, steps, seed], [drawn, status], stop)
    hint.click(put, where, [*numbers, told], **AT_ONCE)
    gr.on([page.load, *moves], move, [prompt, own, *described], [hint, *wording], **AT_ONCE)
    gr.on([two.input, *(colour.input for colour in colours)], write, described, wording, **AT_ONCE)
    page.load(own_guidance, None, guidance, **AT_ONCE)


def words_tab(words: Words, page: gr.Blocks) -> None:
    """A prompt with learned words, drawn several times."""

    def known() -> tuple[str, str]:
        try:
            tokens = words.tokens()
            return notice(words.missing()), f"Learned: {', '.join(f'`{token}`' for token in tokens)}" if tokens else ""
        except UserError as error:
            return complaint(str(error)), ""

    def draw(*inputs: Any) -> Iterator[tuple]:
        for picture, status in words.draw(*inputs):
            yield figure("pictures", picture), status

    word = gr.HTML(elem_id="words-notice")
    gr.Markdown(
        "A learned word is a row of the text encoder's table that was trained on a few pictures of one thing, while all"
        " other weights stayed as they were. Write it into the prompt like any other word. Custom Diffusion learned the"
        " words together with matrices of the U-Net: it alone can put two learned words into one picture."
    )
    tokens = gr.Markdown(elem_id="words-tokens")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            prompt = gr.Textbox("gold circle with navy background", label="prompt", elem_id="words-prompt", lines=2)
            way = gr.Radio(word_page.WAYS, value=word_page.INVERSION, label="learned by")
            count = gr.Slider(1, word_page.MOST_PICTURES, 4, step=1, label="pictures")
            guidance = gr.Slider(0, word_page.MOST_GUIDANCE, words.guidance(), step=0.5, label="guidance")
            steps = gr.Slider(1, word_page.MOST_STEPS, 10, step=1, label="steps")
            method = gr.Radio(SAMPLERS, value="dpm-solver++", label="sampler")
            seed = gr.Number(0, label="seed", precision=0)
            button, stop, status = buttons("words")
        with gr.Column(scale=2):
            drawn = gr.HTML(figure("pictures"), elem_id="words-picture")
    inputs = [prompt, way, count, guidance, method, steps, seed]
    event = drawing([button.click], draw, inputs, [drawn, status], stop)
    for trigger in (page.load, event.then):
        trigger(known, None, [word, tokens], **AT_ONCE)


def make_page(digits: Digits, faces: Faces, circles: Circles, words: Words) -> gr.Blocks:
    """The whole page."""
    with gr.Blocks(title="Diffusion studio", analytics_enabled=False) as page:
        gr.Markdown("# Diffusion studio")
        with gr.Tab("Digits"):
            digits_tab(digits)
        with gr.Tab("Two faces"):
            faces_tab(faces, page)
        with gr.Tab("Circles"):
            circles_tab(circles, page)
        with gr.Tab("Learned words"):
            words_tab(words, page)
    return page
