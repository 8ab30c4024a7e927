#!/bin/sh
# The second half: puts cryofleet and the folders beside it (services or orchestrator) in /opt/cryofleet, compiled.
set -eu
/tools/bin/python -m pip wheel --quiet --no-index --no-build-isolation --no-deps --wheel-dir /tmp/wheel .
/tools/bin/python -m pip --python /opt/venv/bin/python install --quiet --no-index --no-deps --no-cache-dir \
    --target /opt/cryofleet /tmp/wheel/*.whl
cp -r "$@" /opt/cryofleet/
/opt/venv/bin/python -m compileall -q "/opt/cryofleet/$1"
