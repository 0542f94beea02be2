"""The studio: play with the three problems in the browser, on this machine alone.

make studio                                  # installs what it needs and starts it
python studio/app.py --port 8000             # with studio/requirements.txt installed
python studio/app.py --face-weights UNet.pt  # the course's face network

It listens on the loopback address and fetches nothing from anywhere. Stop it with Ctrl+C.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, UserError, run, say, silence
from common.runtime import PRECISIONS, pick_device
from p1_ddpm.sample import WEIGHTS as DIGIT_WEIGHTS
from p2_ddim.sample import WEIGHTS as FACE_WEIGHTS
from p3_controlnet import sample as controlnet
from p3_personalization import generate
from studio.pages import Circles, Digits, Faces, Words
from studio.parts import Page

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
# Read by Gradio and the libraries under it when they are imported.
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
# Whatever a page should ask for elsewhere, the browser refuses.
POLICY = (
    b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    b" style-src 'self' 'unsafe-inline'"
)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="app.py", description=__doc__)
    address = parser.add_argument_group("address")
    address.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in")
    address.add_argument("--port", type=int, default=7860, help="port to listen on")
    weights, own = parser.add_argument_group("weights"), "(default: the base's own)"
    for name, default, nargs, help in (
        ("digit-weights", DIGIT_WEIGHTS, None, "of p1_ddpm/train.py"),
        ("face-weights", FACE_WEIGHTS, None, "of p2_ddim/train.py, or the course's UNet.pt"),
        ("base", controlnet.BASE, None, "Stable Diffusion v1: a file or a folder"),
        ("controlnet", None, "+", f"one or several {own}"),
        ("words", None, "+", f"learned words, one file or several {own}"),
        ("custom", None, None, f"of custom_diffusion.py {own}"),
    ):
        weights.add_argument(f"--{name}", type=Path, default=default, nargs=nargs, metavar="PATH", help=help)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--precision", choices=PRECISIONS, default="auto", help="of all networks but the faces'")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def with_policy(app: Callable) -> Callable:
    """An ASGI application that adds `POLICY` to every answer of another."""

    async def answer(scope: Any, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await app(scope, receive, send_with_policy)

    return answer


def make_pages(args: Namespace) -> list[Page]:
    """What answers behind each tab; a `UserError` if there is no such device."""
    device = pick_device(args.device)
    given = [Namespace(**vars(program.parse_arguments([])) | vars(args)) for program in (controlnet, generate)]
    digits, faces = Digits(args.digit_weights, device, args.precision), Faces(args.face_weights, device)
    return [digits, faces, Circles(given[0]), Words(given[1])]


def start(args: Namespace) -> Any:
    """Start the server in a thread, and return Gradio's page; a `UserError` without Gradio, device or free address."""
    os.environ.update(OFFLINE)
    try:
        from starlette.middleware import Middleware

        from studio import tabs
    except ImportError as error:
        mend = "run make studio, or install it with pip install -r"
        raise UserError(f"the studio needs {REQUIREMENTS} ({error}); {mend}") from None
    page = tabs.make_page(*make_pages(args))
    options = {"theme": tabs.THEME, "css": tabs.CSS, "app_kwargs": {"middleware": [Middleware(with_policy)]}}
    options |= {"quiet": True, "prevent_thread_lock": True, "footer_links": []}
    # _frontend is a look at its own address, which fails behind a proxy or on a busy machine.
    options |= dict.fromkeys(("share", "ssr_mode", "enable_monitoring", "_frontend"), False)
    try:
        page.queue(max_size=16).launch(server_name=args.host, server_port=args.port, **options)
    except OSError:
        mend = "taken, or no address of this machine; choose another"
        raise UserError(f"--host {args.host} --port {args.port}: {mend}") from None
    return page


def main(args: Namespace) -> None:
    """Serve until Ctrl+C; raises as `start`."""
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: choose from 1 to 65535")
    if args.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: everyone who reaches {args.host} can draw here", file=sys.stderr)
    page = start(args)
    say(f"The studio is at {page.local_url} (Ctrl+C stops it)")
    try:
        with silence():  # the progress of a drawing is shown in the page
            Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)


if __name__ == "__main__":
    run(main, parse_arguments())
