#!/bin/sh
# Makes a base image of Debian's own packages, for places that no registry reaches: images/debootstrap-base.sh IMAGE FOLDER
# SUITE and MIRROR are debootstrap's. What was made is kept in FOLDER and used again. Runs as root, with buildah.
set -eu
image=$1
folder=$2
: "${SUITE:=bookworm}" "${MIRROR:=http://deb.debian.org/debian}"
for tool in debootstrap buildah; do
    command -v "$tool" >/dev/null || { echo "this needs $tool: apt-get install $tool" >&2; exit 1; }
done
archive=$folder/$SUITE.tar
if [ ! -f "$archive" ]; then
    mkdir -p "$folder"
    root=$(mktemp -d "$folder/root.XXXXXX")
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv "$SUITE" "$root" "$MIRROR"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
    tar -C "$root" -cf "$archive.part" .
    mv "$archive.part" "$archive"
fi
container=$(buildah from scratch)
buildah add --quiet "$container" "$archive" / >/dev/null
buildah config --env LANG=C.UTF-8 --cmd python3 "$container"
buildah commit --quiet --rm "$container" "$image" >/dev/null
