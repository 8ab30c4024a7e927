#!/bin/sh
# Installs what checks the manifests into a folder: checks/install.sh FOLDER PYTHON
# kubectl and promtool come from Debian, by apt with lists of its own: nothing of this machine's packages is changed, and
# no root is needed. checkov gets a virtual environment of its own, for it pins versions that the project has newer.
# Elsewhere than on Debian: KUBECTL=/path PROMTOOL=/path name those of the machine.
set -eu
: "${DEBIAN_MIRROR:=http://deb.debian.org/debian}" "${PIP_OPTIONS:=}" "${KUBECTL:=}" "${PROMTOOL:=}"
kubectl_version=1.32.3
promtool_version=2.53.3
folder=$1
python=$2
checks=$(cd "$(dirname "$0")" && pwd)

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
test -x "$folder/bin/python" || "$python" -m venv "$folder"
# shellcheck disable=SC2086 # several options
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check $PIP_OPTIONS \
    --no-deps -r "$checks/requirements.txt"

if [ -n "$KUBECTL" ] && [ -n "$PROMTOOL" ]; then
    ln -sf "$KUBECTL" "$folder/bin/kubectl"
    ln -sf "$PROMTOOL" "$folder/bin/promtool"
    exit 0
fi
command -v apt-get >/dev/null || { echo "without apt-get, name your kubectl and promtool: KUBECTL=... PROMTOOL=..." >&2; exit 1; }
work=$folder/debian
rm -rf "$work"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/packages"
cat >"$work/debian.sources" <<END
Types: deb
URIs: $DEBIAN_MIRROR
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
apt() {
    apt-get -qq -o Dir::Etc::SourceList="$work/debian.sources" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User="$(id -un)" "$@"
}
apt update
# The versions are pinned up to Debian's own security rebuilds of them, which take the place of the package they mend.
(cd "$work/packages" && apt download "kubectl=$kubectl_version*" "promtool=$promtool_version*")
for package in "$work/packages"/*.deb; do
    dpkg-deb -x "$package" "$work/files"
done
mv -f "$work/files/usr/bin/kubectl" "$work/files/usr/bin/promtool" "$folder/bin/"
rm -rf "$work"
