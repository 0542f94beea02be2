"""How programs talk to their users: the help, what can be mended, and --quiet."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.progress import silenced


class UserError(Exception):
    """A problem the user can mend; its text is one line that names the file or value and the mend."""


def shown(default: Any) -> str:
    """A flag's default as one would type it: paths inside the present folder as seen from there."""
    if isinstance(default, list | tuple):
        return " ".join(map(shown, default))
    if isinstance(default, Path) and default.is_relative_to(Path.cwd()):
        return os.path.relpath(default)
    return str(default)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is laid out, and the defaults of all flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain_switch = action.const is True and action.default is False
        if action.default in (None, (), []) or plain_switch:
            return action.help
        return (super()._get_help_string(action) or "").replace("%(default)s", shown(action.default).replace("%", "%%"))


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults in `--help`, complains in one line, and knows `--quiet`."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)
        self._optionals.title = "general"
        # Without a default, so that a subcommand does not take back what was said before it.
        self.add_argument(
            "-q",
            "--quiet",
            action="store_true",
            default=argparse.SUPPRESS,
            help="say nothing of the progress and of what was written; results, warnings and errors remain",
        )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def run(main: Callable, args: argparse.Namespace) -> None:
    """Call `main(args)`, in silence if it says `--quiet`.

    A `UserError`, a full disk, and a file that the system refuses become one line on stderr and exit code 2.
    """
    try:
        with silenced(getattr(args, "quiet", False)):
            main(args)
    except (UserError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if error.filename is None:
                raise
            text = f"{error.filename}: {error.strerror}; check the path and its permissions"
        print("error:", " ".join(text.split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
