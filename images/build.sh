#!/bin/sh
# Builds images with docker, podman or buildah, whichever is there: images/build.sh SERVICE ...
# BUILDER names one of them; BASE, PYTHON_IN_BASE and TORCH are the builds' arguments (docs/images.md), BUILD_OPTIONS
# further options. An image is REGISTRY/cryofleet-SERVICE:TAG; its bill of materials comes to build/images.
set -eu
cd "$(dirname "$0")/.."
: "${BUILDER:=$(command -v docker || command -v podman || command -v buildah || true)}"
: "${WHEELHOUSE:=build/wheelhouse}" "${TORCH:=cpu}" "${REGISTRY:=localhost}" "${BUILD_OPTIONS:=}" "${SBOMS:=build/images}"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)
: "${TAG:=$version}"
: "${REVISION:=$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
[ -n "$BUILDER" ] || { echo "building images needs docker, podman or buildah; install one of them" >&2; exit 1; }
ls "$WHEELHOUSE"/*.whl >/dev/null 2>&1 || { echo "$WHEELHOUSE has no wheels; fill it with: make wheelhouse" >&2; exit 1; }
tool=$(basename "$BUILDER")
case $tool in
docker) export DOCKER_BUILDKIT=1 && format="" ;;
*) format="--layers --format docker" ;; # the other format has no place for a health check
esac

read_file() { # $1: image, $2: path
    if [ "$tool" = buildah ]; then
        container=$(buildah from --pull-never "$1")
        buildah run "$container" -- cat "$2"
        buildah rm "$container" >/dev/null
    else
        "$BUILDER" run --rm --entrypoint cat "$1" "$2"
    fi
}

mkdir -p "$SBOMS"
for service in "$@"; do
    image="$REGISTRY/cryofleet-$service:$TAG"
    # shellcheck disable=SC2086 # several options
    "$BUILDER" build $format $BUILD_OPTIONS --file "images/$service/Dockerfile" --tag "$image" \
        --build-context "wheelhouse=$WHEELHOUSE" --build-arg "TORCH=$TORCH" \
        ${BASE:+--build-arg "BASE=$BASE"} ${PYTHON_IN_BASE:+--build-arg "PYTHON=$PYTHON_IN_BASE"} \
        --build-arg "VERSION=$version" --build-arg "REVISION=$REVISION" .
    read_file "$image" /opt/venv/sbom.cdx.json >"$SBOMS/$service.cdx.json"
    echo "$image, its bill of materials in $SBOMS/$service.cdx.json"
done
