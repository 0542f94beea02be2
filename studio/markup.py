"""What the studio shows, as HTML: pictures with captions, how far a drawing is, notices and complaints."""

import base64
import html
import io

from PIL.Image import Image

from studio.parts import NOTHING, Status

CSS = """
/* Gradio's own padding would move these out of line with the rest. */
.html-container:has(> * > [class^="studio-"]) { padding: 0; }
.studio-figure { margin: 0; }
.studio-figure figcaption { margin-bottom: 0.4rem; }
.studio-figure img { width: 100%; border-radius: 4px; image-rendering: pixelated; }
.studio-figure .smooth { image-rendering: auto; }
.studio-figure .empty { aspect-ratio: 1; border: 1px dashed var(--border-color-primary); border-radius: 4px; }
.studio-line { display: flex; gap: 0.75rem; align-items: center; min-height: 2.2rem; }
.studio-line progress { appearance: none; width: 10rem; height: 0.5rem; background: var(--border-color-primary); }
.studio-line progress::-webkit-progress-bar { background: var(--border-color-primary); }
.studio-line progress::-webkit-progress-value { background: var(--primary-500); }
.studio-line progress::-moz-progress-bar { background: var(--primary-500); }
.studio-complaint, .studio-notice { border-radius: 6px; padding: 0.5rem 0.75rem; overflow-wrap: anywhere; }
.studio-complaint { color: #991b1b; background: #fee2e2; }
.studio-notice { color: #713f12; background: #fef9c3; }
[id$="-notice"]:not(:has([role])), [id$="-told"]:not(:has([role])) { display: none; }
#faces-plot figure { max-width: 40rem; }
#circles-hint img { cursor: crosshair; }
"""


def figure(caption: str, picture: Image | None = None, smooth: bool = False) -> str:
    """A caption and under it a picture, which comes along in the text, or an empty frame.

    Args:
        caption: one line.
        picture: to show.
        smooth: whether the browser may blur it when it enlarges it.
    """
    inner = '<div class="empty"></div>'
    if picture is not None:
        file = io.BytesIO()
        picture.save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
        kind = ' class="smooth"' if smooth else ""
        inner = f'<img{kind} alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
    return f'<figure class="studio-figure"><figcaption>{html.escape(caption)}</figcaption>{inner}</figure>'


def line(status: Status = NOTHING) -> str:
    """A status, with a bar while something is being drawn."""
    bar = f'<progress value="{status.done}" max="{status.total}"></progress>' if status.total else ""
    return f'<div class="studio-line" role="status">{bar}<span>{html.escape(status.text)}</span></div>'


def complaint(message: str) -> str:
    """What went wrong."""
    return f'<div class="studio-complaint" role="alert">{html.escape(message)}</div>'


def notice(text: str) -> str:
    """Something to know before one begins; "" for nothing."""
    return f'<div class="studio-notice" role="note">{html.escape(text)}</div>' if text else ""
