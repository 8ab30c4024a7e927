#!/bin/sh
# Installs the browser of `make test-browser`, on Debian or Ubuntu, as root or by sudo.
set -eu
if [ "$(id -u)" -eq 0 ]; then as_root=; else as_root=sudo; fi
$as_root apt-get update --quiet
$as_root apt-get install --yes --quiet --no-install-recommends chromium
