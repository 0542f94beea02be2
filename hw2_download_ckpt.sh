#!/usr/bin/env bash
# The weights come with the repository; check offline that they are whole: bash hw2_download_ckpt.sh
set -euo pipefail

fail() {
    echo "hw2_download_ckpt.sh: $1" >&2
    exit 2
}

root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
hash=(sha256sum)
command -v sha256sum >/dev/null || hash=(shasum -a 256)
checked=0
shopt -s nullglob
for sums in "$root"/*/weights/SHA256SUMS "$root"/*/*/weights/SHA256SUMS; do
    while read -r expected name; do
        file=$(dirname "$sums")/$name
        [[ -f $file ]] || fail "$file is missing; restore it with: git -C '$root' checkout -- '$file'"
        actual=$("${hash[@]}" <"$file")
        [[ ${actual%% *} == "$expected" ]] || fail "$file is damaged; restore it with: git -C '$root' checkout -- '$file'"
        checked=$((checked + 1))
    done <"$sums"
done
((checked)) || fail "$root: holds no weights/SHA256SUMS that list files; clone the repository again"
echo "hw2_download_ckpt.sh: all weights are whole (files checked: $checked)"
