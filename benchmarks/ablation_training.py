"""What the ablations that train have in common: short runs, each in a folder that its settings name."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.ablation_tables import ROOT

# A short run warms up quickly, and averages over the last part of itself.
LEARNING = {"warmup": 20, "ema": 0.98, "save_every": 50}
RUNS = {"out": (ROOT / "outputs" / "ablations", "folder of the runs; those that are finished are taken as they are")}


def run_folder(out: Path, variant: str, facts: Mapping[str, Any]) -> Path:
    """The folder of one training: another one for every variant and every change of its settings."""
    digest = hashlib.sha256(json.dumps([variant, facts], default=str, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"\W+", "-", variant).strip("-")
    return out / f"{name}-{digest[:8]}"
