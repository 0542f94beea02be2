"""The studio's command: who may reach it, what it says without Gradio, and that nothing else leans on it."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from common.cli import UserError
from studio import app

ROOT = Path(__file__).resolve().parent.parent.parent


def test_it_listens_on_loopback_unless_told_otherwise(capsys, monkeypatch):
    monkeypatch.setattr(app, "start", lambda args: sys.exit(f"{args.host}:{args.port}"))
    for flags, warned in (([], False), (["--host", "localhost"], False), (["--host", "0.0.0.0"], True)):
        with pytest.raises(SystemExit) as stopped:
            app.main(app.parse_arguments([*flags, "--port", "7999"]))
        assert str(stopped.value) == f"{flags[1] if flags else '127.0.0.1'}:7999"
        assert ("everyone who reaches" in capsys.readouterr().err) == warned
    assert app.is_loopback("::1")
    assert not app.is_loopback("example.org")


def test_without_gradio_it_says_what_to_do(monkeypatch):
    for name in ("gradio", "starlette", "starlette.middleware"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(app.os, "environ", {})
    with pytest.raises(UserError, match=r"studio/requirements\.txt .*run make studio"):
        app.start(app.parse_arguments([]))
    assert app.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_bad_arguments(capsys):
    with pytest.raises(UserError, match="--port 0: choose from 1 to 65535"):
        app.main(app.parse_arguments(["--port", "0"]))
    with pytest.raises(UserError, match="--device nothing"):
        app.make_pages(app.parse_arguments(["--device", "nothing"]))
    with pytest.raises(SystemExit):
        app.parse_arguments(["--help"])
    assert "--host HOST" in capsys.readouterr().out


def test_the_weights_named_are_those_used(tmp_path):
    names = ("digit-weights", "face-weights", "base", "controlnet", "words", "custom")
    flags = [part for name in names for part in (f"--{name}", str(tmp_path / name))]
    pages = app.make_pages(app.parse_arguments([*flags, "--device", "cpu", "--precision", "fp32"]))
    assert pages["digits"].weights == tmp_path / "digit-weights"
    assert pages["faces"].weights == tmp_path / "face-weights"
    assert (pages["circles"].args.base, pages["circles"].args.controlnet) == (
        tmp_path / "base",
        [tmp_path / "controlnet"],
    )
    assert (pages["words"].args.base, pages["words"].args.words) == (tmp_path / "base", [tmp_path / "words"])
    assert pages["words"].args.custom == tmp_path / "custom"
    assert {page.args.precision for name, page in pages.items() if name in ("circles", "words")} == {"fp32"}


def test_every_answer_forbids_the_browser_to_ask_elsewhere():
    sent = []

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b""})

    async def send(message):
        sent.append(message)

    asyncio.run(app.ContentPolicy(answer)({"type": "http"}, None, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"x"] == b"y"
    assert headers[b"content-security-policy"].startswith(b"default-src 'self'")
    assert b"http" not in headers[b"content-security-policy"]
    assert sent[1] == {"type": "http.response.body", "body": b""}


def test_nothing_else_imports_the_studio_and_gradio_stays_in_two_files():
    importing = re.compile(r"^\s*(?:from|import) (studio|gradio)\b", re.MULTILINE)
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = {}
    for folder in folders:
        if folder.name in ("runs", "outputs", "hw2_data", "checkpoints"):
            continue
        for file in folder.rglob("*.py"):
            for name in importing.findall(file.read_text(encoding="utf-8")):
                found.setdefault(name, set()).add(file.relative_to(ROOT).as_posix())
    assert found["gradio"] == {"studio/tabs.py", "studio/widgets.py"}
    assert {name.rpartition("/")[0] for name in found["studio"]} == {"studio", "tests/studio"}
