"""The studio: play with the three problems in the browser, on this machine alone.

make studio                                  # installs what it needs and starts it
python studio/app.py --port 8000             # with studio/requirements.txt installed
python studio/app.py --face-weights UNet.pt  # the course's face network

It listens on the loopback address and fetches nothing from anywhere. Stop it with Ctrl+C.
"""

import os
import sys
from ipaddress import ip_address
from pathlib import Path
from threading import Event
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, UserError, run, say, silence
from common.runtime import PRECISIONS, pick_device, pick_precision
from p1_ddpm.sample import WEIGHTS as DIGIT_WEIGHTS
from p2_ddim.sample import WEIGHTS as FACE_WEIGHTS
from p3_controlnet import sample as controlnet
from p3_personalization import generate
from studio.circles import Circles
from studio.digits import Digits
from studio.faces import Faces
from studio.markup import CSS
from studio.words import Words

REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
# Read by Gradio and the libraries under it when they are imported.
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
# Whatever a page should ask for elsewhere, the browser refuses.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'"
)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(prog="app.py", description=__doc__)
    address = parser.add_argument_group("address")
    address.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in")
    address.add_argument("--port", type=int, default=7860, help="port to listen on")
    weights = parser.add_argument_group("weights")
    weights.add_argument("--digit-weights", type=Path, default=DIGIT_WEIGHTS, help="of p1_ddpm/train.py")
    weights.add_argument(
        "--face-weights", type=Path, default=FACE_WEIGHTS, help="of p2_ddim/train.py, or the course's UNet.pt"
    )
    weights.add_argument("--base", type=Path, default=controlnet.BASE, help="Stable Diffusion v1: a file or a folder")
    weights.add_argument(
        "--controlnet", type=Path, nargs="+", metavar="PATH", help="one or several (default: the base's own)"
    )
    weights.add_argument(
        "--words", type=Path, nargs="+", metavar="FILE", help="learned words (default: the base's own)"
    )
    weights.add_argument("--custom", type=Path, metavar="FILE", help="of custom_diffusion.py (default: the base's own)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--precision", choices=PRECISIONS, default="auto", help="of all networks but the faces'")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


class ContentPolicy:
    """Adds `POLICY` to every answer of an ASGI application."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def make_pages(args) -> dict[str, Any]:
    """What answers behind each tab, by the names that `make_page` takes."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    given = controlnet.parse_arguments(["--device", args.device, "--precision", args.precision])
    given.base, given.controlnet = args.base, args.controlnet
    learned = generate.parse_arguments(["--device", args.device, "--precision", args.precision])
    learned.base, learned.words, learned.custom = args.base, args.words, args.custom
    return {
        "digits": Digits(args.digit_weights, device, precision),
        "faces": Faces(args.face_weights, device, "fp32"),
        "circles": Circles(given),
        "words": Words(learned),
    }


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def start(args) -> Any:
    """Start the server in a thread of its own; returns Gradio's page, whose `close` stops it.

    Raises:
        UserError: Gradio is not installed, there is no such device, or the address cannot be listened on.
    """
    os.environ.update(OFFLINE)
    try:
        from starlette.middleware import Middleware

        from studio import tabs, widgets
    except ImportError as error:
        raise UserError(
            f"the studio needs {REQUIREMENTS} ({error}); run make studio, or install it with pip install -r"
        ) from None
    page = tabs.make_page(**make_pages(args))
    try:
        page.queue(max_size=16).launch(
            server_name=args.host,
            server_port=args.port,
            quiet=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            footer_links=[],
            theme=widgets.theme(),
            css=CSS,
            app_kwargs={"middleware": [Middleware(ContentPolicy)]},
            prevent_thread_lock=True,
        )
    except OSError:
        raise UserError(
            f"--host {args.host} --port {args.port}: taken, or no address of this machine; choose another"
        ) from None
    return page


def main(args) -> None:
    """Serve until Ctrl+C.

    Raises:
        UserError: see `start`.
    """
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: choose from 1 to 65535")
    if not is_loopback(args.host):
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
