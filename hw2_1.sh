#!/usr/bin/env bash
# Draw the graded digits into OUT: bash hw2_1.sh OUT [further arguments of p1_ddpm/sample.py]
set -euo pipefail

case "${1:-}" in
    -h | --help) ;;
    "" | -*)
        echo "hw2_1.sh: the first argument must be the output folder: bash hw2_1.sh OUT [--layout 2024] [--seed 3] ..." >&2
        exit 2
        ;;
esac

# No cd: relative arguments belong to the caller's folder.
root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=python3
[[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
exec "${PYTHON:-$python}" "$root/p1_ddpm/sample.py" "$@"
