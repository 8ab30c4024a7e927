#!/bin/sh
# Generates cryofleet/v1 from protos/; `make protos` calls it and the output is committed.
# With --check it generates elsewhere and fails where the committed output differs.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PATH="$(dirname "$python"):$PATH"
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
out="$root/cryofleet/v1"
mkdir -p "$out"
{
    "$python" -m grpc_tools.protoc -Iprotos --python_out="$root" --mypy_out="$root" --grpc_python_out="$root" \
        --mypy_grpc_out="$root" protos/cryofleet/v1/*.proto
    "$python" -m grpc_tools.protoc -Iprotos --python_out="$out" --mypy_out="$out" protos/buf/validate/validate.proto
} 2>&1 | grep -v '^Writing mypy' || true
test -s "$out/runtime_pb2.py" && test -s "$out/buf/validate/validate_pb2.py"
# The rules' module lives inside our package: the import name "buf" is not ours to take.
sed -i 's/^from buf\.validate import/from cryofleet.v1.buf.validate import/; s/^import buf\.validate\.validate_pb2/import cryofleet.v1.buf.validate.validate_pb2/' \
    "$out"/*_pb2.py "$out"/*_pb2.pyi
touch "$out/__init__.py" "$out/buf/__init__.py" "$out/buf/validate/__init__.py"
# Files without a service leave empty gRPC modules behind.
for f in common options; do rm -f "$out/${f}_pb2_grpc.py" "$out/${f}_pb2_grpc.pyi"; done
if [ "${1:-}" = --check ]; then
    diff -r --exclude=__pycache__ "$out" cryofleet/v1 || { echo "cryofleet/v1 does not match protos/: run make protos"; exit 1; }
else
    rm -rf cryofleet/v1
    cp -r "$out" cryofleet/v1
fi
