#!/bin/sh
# The first half of an image's build: packages.sh EXTRA installs the service's third-party packages in /opt/venv, from the
# wheelhouse alone, and writes their bill of materials. The tools for that stay in /tools, which the image doesn't get.
set -eu
: "${PYTHON:=python3}" "${TORCH:=}"
"$PYTHON" -m venv /tools
/tools/bin/python -m pip install --quiet --no-index --no-cache-dir --no-compile --find-links /wheelhouse \
    -r tools.txt
"$PYTHON" -m venv --without-pip /opt/venv
/tools/bin/python requirements.py "$1" >requirements.txt
/tools/bin/python -m pip --python /opt/venv/bin/python install --quiet --no-index --no-cache-dir --only-binary :all: \
    --find-links /wheelhouse ${TORCH:+--find-links "/wheelhouse/torch-$TORCH"} -c constraints.txt -r requirements.txt
/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON \
    --output-file /opt/venv/sbom.cdx.json /opt/venv
