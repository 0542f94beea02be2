"""What the Fall 2024 grader asks for: a table of concepts with their prompts, and the files that are to be drawn."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import UserError

COUNT = 25  # pictures of each prompt
EXAMPLE = '{"0": {"token_name": "<new1>", "prompt": ["A photo of <new1>."]}}'


@dataclass(frozen=True)
class Concept:
    """One entry of the table.

    Attributes:
        number: its name there, and that of its folders.
        token: the word that stands for it.
        prompts: what to draw.
        judged_prompts: the same in words that everyone knows, for CLIP; empty if the table has none.
        baselines: of each prompt, what the mean scores of images and of texts must reach; empty if the table has none.
    """

    number: str
    token: str
    prompts: list[str]
    judged_prompts: list[str]
    baselines: list[tuple[float, float]]

    def files(self, prompt: int, count: int) -> list[Path]:
        """The pictures of one prompt, within the output folder."""
        folder = Path(self.number) / str(prompt)
        return [folder / f"source{self.number}_prompt{prompt}_{k}.png" for k in range(count)]


def texts(fields: Mapping[str, Any], name: str, where: str) -> list[str]:
    """A field that is a list of texts, or one text.

    Raises:
        UserError: it is anything else.
    """
    value = fields.get(name, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f'{where}: "{name}" is {json.dumps(value)[:40]}; write a list of texts, as in {EXAMPLE}')
    return value


def read_concept(number: str, fields: Any, where: str) -> Concept:
    """One entry of the table.

    Raises:
        UserError: something in it is missing, of another kind, or does not go together.
    """
    if not number.isalnum():  # it names a folder
        raise UserError(f"{where}: its name is no number or word; write it as in {EXAMPLE}")
    if not isinstance(fields, dict):
        raise UserError(f"{where}: is {json.dumps(fields)[:40]}; write it as in {EXAMPLE}")
    token, prompts = fields.get("token_name"), texts(fields, "prompt", where)
    if not isinstance(token, str) or not token.strip():
        raise UserError(f'{where}: has no "token_name"; write it as in {EXAMPLE}')
    if not prompts:
        raise UserError(f'{where}: has no "prompt"; write it as in {EXAMPLE}')
    judged, baselines = texts(fields, "prompt_4_clip_eval", where), fields.get("baseline", [])
    try:
        baselines = [(float(image), float(text)) for image, text in baselines]
    except (TypeError, ValueError):
        raise UserError(
            f'{where}: "baseline" is {json.dumps(baselines)[:40]}; write pairs such as [[79, 34], [74, 35]]'
        ) from None
    for name, given in (("prompt_4_clip_eval", judged), ("baseline", baselines)):
        if given and len(given) != len(prompts):
            raise UserError(f'{where}: "{name}" has {len(given)} entries for {len(prompts)} prompts; give one each')
    return Concept(number, token.strip(), prompts, judged, baselines)


def read_table(path: Path) -> list[Concept]:
    """The concepts of an `input.json`, in its order.

    Raises:
        UserError: no such file, not JSON, or an entry that cannot be used; with its name.
    """
    path = Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file such as input.json") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); write it as in {EXAMPLE}") from None
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path}: not an object of concepts; write it as in {EXAMPLE}")
    return [read_concept(number, fields, f"{path} concept {number!r}") for number, fields in table.items()]
