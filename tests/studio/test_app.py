"""The studio's command: who may reach it and what it says without Gradio."""

import asyncio
import sys

import pytest

from common.cli import UserError
from studio import app
from tests.programs import parse, run


@pytest.mark.parametrize(("host", "warned"), [(None, False), ("localhost", False), ("::1", False), ("0.0.0.0", True)])
def test_it_listens_on_loopback_unless_told_otherwise(host, warned, capsys, monkeypatch):
    monkeypatch.setattr(app, "start", lambda args: sys.exit(f"{args.host}:{args.port}"))
    with pytest.raises(SystemExit, match=rf"^{host or '127.0.0.1'}:7999$"):
        run(app, *(["--host", host] if host else []), "--port", 7999)
    assert ("everyone who reaches" in capsys.readouterr().err) == warned


def test_without_gradio_it_says_what_to_do(monkeypatch):
    for name in ("gradio", "starlette", "starlette.middleware"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(app.os, "environ", {})
    with pytest.raises(UserError, match=r"studio/requirements\.txt .*run make studio"):
        app.start(app.parse_arguments([]))
    assert app.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_bad_arguments():
    with pytest.raises(UserError, match="--port 0: choose from 1 to 65535"):
        run(app, "--port", 0)
    with pytest.raises(UserError, match="--device nothing"):
        app.make_pages(parse(app, "--device", "nothing"))


def test_the_weights_named_are_those_used(tmp_path):
    names = ("digit-weights", "face-weights", "base", "controlnet", "words", "custom")
    flags = [part for name in names for part in (f"--{name}", tmp_path / name)]
    digits, faces, circles, words = app.make_pages(parse(app, *flags, "--precision", "fp32"))
    assert (digits.weights, faces.weights) == (tmp_path / "digit-weights", tmp_path / "face-weights")
    assert (circles.args.base, circles.args.controlnet) == (tmp_path / "base", [tmp_path / "controlnet"])
    learned = (words.args.base, words.args.words, words.args.custom)
    assert learned == (tmp_path / "base", [tmp_path / "words"], tmp_path / "custom")
    assert circles.args.precision == words.args.precision == "fp32"


def test_every_answer_forbids_the_browser_to_ask_elsewhere():
    sent = []

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})

    async def send(message):
        sent.append(message)

    asyncio.run(app.with_policy(answer)({"type": "http"}, None, send))
    (kept, (name, policy)) = sent[0]["headers"]
    assert (kept, name) == ((b"x", b"y"), b"content-security-policy")
    assert policy.startswith(b"default-src 'self'")
    assert b"http" not in policy
