"""One kind of error for everything a user can mend, and the way it reaches them."""

import argparse
import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """A problem the user can mend; its text is one line that names the file or value and the mend."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is laid out, and the defaults of all flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, ()) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults in `--help` and complains in one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def run(main: Callable, args: argparse.Namespace) -> None:
    """Call `main(args)`; a `UserError` or a full disk becomes one line on stderr and exit code 2."""
    try:
        main(args)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
