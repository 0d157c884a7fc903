#!/bin/sh
# Makes .venv-oldest ready: the oldest torch that is supported and what the unit tests of the method need, without the
# libraries that a bare machine with a GPU lacks (Ray, FFCV, MLflow, DeepSpeed, Optuna). Called by `make test-oldest`.
set -eu
cd "$(dirname "$0")/.."

packages="torch==2.11.0 torchvision==0.26.0 hypothesis pytest pytest-xdist nvidia-ml-py
    fsspec huggingface_hub matplotlib numba numpy onnx onnxruntime onnxscript pillow psutil pyarrow pyautoattack pydantic
    pyyaml rich safetensors scikit-learn scipy timm jinja2"
python=${PYTHON_OLDEST:-$(.venv/bin/python -c 'import sys; print(sys.executable)')}
stamp=.venv-oldest/setup-stamp
key=$({ cat constraints.txt .ci/oldest.sh; "$python" -V; } | sha256sum | cut -d' ' -f1)
if [ "$(cat $stamp 2>/dev/null)" = "$key" ]; then exit 0; fi

echo "setup: creating .venv-oldest with $("$python" -V) and torch 2.11.0" >&2
"$python" -m venv --clear .venv-oldest
# All else in the versions of the main environment, what torch itself pins excepted.
grep -vE '^(torch|torchvision|triton|nvidia-|cuda-|setuptools|sympy)' constraints.txt >.venv-oldest/constraints.txt
# shellcheck disable=SC2086  # one word a package
.venv-oldest/bin/python -m pip --disable-pip-version-check -qq install -c .venv-oldest/constraints.txt $packages
echo "$key" >$stamp
