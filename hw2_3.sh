#!/usr/bin/env bash
# Draw pictures after hints: bash hw2_3.sh [JSON SOURCE OUT [SD_CKPT]] [further arguments of p3_controlnet/sample.py]
set -euo pipefail

if (($#)) && [[ $1 != -* ]] && [[ -z $1 || -z ${2:-} || $2 == -* || -z ${3:-} || $3 == -* ]]; then
    echo "hw2_3.sh: name the table, the hints and the output folder: bash hw2_3.sh JSON SOURCE OUT [SD_CKPT] ..." >&2
    exit 2
fi

# No cd: relative arguments belong to the caller's folder.
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=python3
[[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
exec "${PYTHON:-$python}" "$root/p3_controlnet/sample.py" "$@"
