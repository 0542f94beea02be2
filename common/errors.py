"""One kind of error for everything a user can mend, and the way it reaches them."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """A problem the user can mend; its text is one line that names the file or value and the mend."""


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults in `--help` and complains in one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def run(main: Callable, args: argparse.Namespace) -> None:
    """Call `main(args)`; a `UserError` becomes its one line on stderr and exit code 2."""
    try:
        main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
