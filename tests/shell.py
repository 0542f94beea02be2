"""Commands as a user would call them, without the variables of an outer make."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Variables of an outer make would reach the inner one.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEFILES", "CDPATH")
}


def call(*command, cwd: Path = ROOT, patience: float = 60, **environment) -> subprocess.CompletedProcess:
    """Run a command to its end, within so many seconds, with stdout and stderr as text."""
    arguments = [str(word) for word in command]
    env = ENVIRONMENT | {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        arguments, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=patience
    )
