"""What every problem uses. A program imports it first, so that what ends its other imports is one line on stderr."""

import logging
import sys


def tell(kind, error, trace):
    """As `sys.excepthook`: one line for Ctrl-C, a missing library, or too little memory to load one; exit code 2."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError) or "failed to map segment" in str(error):
        mend = "pip install -r requirements.txt" if "segment" not in str(error) else "give it more memory (ulimit -v)"
        print(f"error: {sys.executable}: {error}; {mend}", file=sys.stderr)
        raise SystemExit(2)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = tell
if sys.version_info < (3, 11):  # noqa: UP036, so that it can be told
    print(
        f"error: {sys.executable}: is older than Python 3.11; use a newer one (hw2_*.sh take $PYTHON)", file=sys.stderr
    )
    raise SystemExit(2)
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no advice where it cannot keep its cache
