#!/bin/sh
# Fills a folder with the wheels of all images: images/wheelhouse.sh FOLDER
# PYTHON is an interpreter of the version that the base image has, with pip; TORCH is cpu or cuda; PIP_OPTIONS says where
# packages come from, where pip's own settings don't. Both builds of torch can lie in one wheelhouse.
set -eu
cd "$(dirname "$0")/.."
folder=$1
: "${PYTHON:=python3.11}" "${TORCH:=cpu}" "${PIP_OPTIONS:=}"
"$PYTHON" -m pip --version >/dev/null || {
    echo "$PYTHON has no pip: name an interpreter that has one, as PYTHON=/path/to/python3" >&2
    exit 1
}
mkdir -p "$folder/torch-$TORCH"
list=$(mktemp)
trap 'rm -f "$list"' EXIT
wheels() { # $1: where to; then what
    into=$1
    shift
    # shellcheck disable=SC2086 # several options
    "$PYTHON" -m pip wheel --quiet --no-cache-dir --wheel-dir "$into" $PIP_OPTIONS "$@"
}

"$PYTHON" images/requirements.py io picking alignment learning simulation orchestrator viewer >"$list"
version=$(sed -n 's/^torch==//p' "$list")
sed -i '/^torch==/d' "$list"
wheels "$folder" -c constraints.txt -r "$list"
wheels "$folder" -r images/tools.txt
# The two builds differ by what follows the version: the one for GPUs has nothing there, and `===` takes it alone.
case $TORCH in
cpu) torch="torch==$version+cpu" ;;
cuda) torch="torch===$version" ;;
*) echo "TORCH is $TORCH; it must be cpu or cuda" >&2 && exit 1 ;;
esac
wheels "$folder/torch-$TORCH" --find-links "$folder" -c constraints.txt "$torch" || {
    echo "$torch was not found; the index https://download.pytorch.org/whl/cpu has the builds for CPUs," >&2
    echo "PyPI those for GPUs: PIP_OPTIONS=\"--extra-index-url URL\" adds an index" >&2
    exit 1
}
