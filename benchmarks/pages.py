"""Tables in Markdown, and pages of docs/ whose blocks programs fill in."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.checkpoint import write_atomically
from common.cli import UserError


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three figures, without an exponent."""
    if value != value:
        return "-"
    digits = f"{value:.3g}"
    return f"{float(digits):,.0f}" if abs(value) >= 100 else digits


def block_of(text: str, name: str, source: Path) -> tuple[str, str, str]:
    """A page's text before a block, in it, and after it; the comments that begin and end it belong to neither.

    Raises:
        UserError: the page has no such block.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    inside, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{source}: has no block from {begin} to {end}; restore it")
    return before, inside.strip("\n"), after


def replace_block(text: str, name: str, content: str, source: Path) -> str:
    """A page's text with other content between the comments that begin and end a block.

    Raises:
        UserError: the page has no such block.
    """
    before, _, after = block_of(text, name, source)
    return f"{before}<!-- {name} -->\n{content}\n<!-- end of {name} -->{after}"


def write_blocks(page: Path, blocks: Mapping[str, str]) -> None:
    """Fill in blocks of a page; all of them or none.

    Raises:
        UserError: the page cannot be read or written, or has no such block.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page}: cannot be read ({error.strerror}); restore it with git") from None
    for name, content in blocks.items():
        text = replace_block(text, name, content, page)
    write_atomically(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
