#!/usr/bin/env bash
# Draw faces from noises: bash hw2_2.sh [NOISE OUT [UNet.pt]] [further arguments of p2_ddim/sample.py]
set -euo pipefail

if (($#)) && [[ -z $1 || ($1 != -* && (-z ${2:-} || $2 == -*)) ]]; then
    echo "hw2_2.sh: name the noises and the output folder: bash hw2_2.sh NOISE OUT [UNet.pt] [--eta 0.5] ..." >&2
    exit 2
fi

# No cd: relative arguments belong to the caller's folder.
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=python3
[[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
exec "${PYTHON:-$python}" "$root/p2_ddim/sample.py" "$@"
