#!/usr/bin/env bash
# Draw learned words: bash hw2_3_2024.sh [INPUT_JSON OUT [SD_CKPT]] [further arguments of p3_personalization/generate.py]
set -euo pipefail

if (($#)) && [[ $1 != -* ]] && [[ -z $1 || -z ${2:-} || $2 == -* ]]; then
    echo "hw2_3_2024.sh: name the table and the output folder: bash hw2_3_2024.sh INPUT_JSON OUT [SD_CKPT] ..." >&2
    exit 2
fi

# No cd: relative arguments belong to the caller's folder.
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=python3
[[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
exec "${PYTHON:-$python}" "$root/p3_personalization/generate.py" "$@"
