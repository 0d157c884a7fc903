#!/bin/sh
# Makes .venv ready: system packages where something is missing, a virtual environment, the pinned Python packages.
# Does nothing when .venv already fits pyproject.toml, constraints.txt and the interpreter. Called by `make setup`.
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

install_system_packages() { # names of Debian packages
    if ! command -v apt-get >/dev/null; then
        say "no apt-get here; please install what these Debian packages hold: $*"
        return
    fi
    sudo=
    if [ "$(id -u)" -ne 0 ]; then sudo=sudo; fi
    say "installing system packages: $*"
    log=$(mktemp)
    # Tests start PostgreSQL by themselves: Debian's package need not.
    case " $* " in *" postgresql "*)
        $sudo mkdir -p /etc/postgresql-common/createcluster.d
        echo 'create_main_cluster = false' | $sudo tee /etc/postgresql-common/createcluster.d/arat.conf >/dev/null
        ;;
    esac
    # A machine that has just been started may still hold apt's lock for its own updates.
    if ! { $sudo apt-get update -q &&
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qy --no-install-recommends "$@"; } \
        >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        say "apt-get failed; its whole output is in $log"
        exit 1
    fi
    rm -f "$log"
}

find_python() {
    for python in ${PYTHON:-python3.11 python3}; do
        if is_new_enough "$python"; then return; fi
    done
    if [ -z "${PYTHON:-}" ] && ! command -v python3 >/dev/null; then
        install_system_packages python3
        python=python3
        if is_new_enough "$python"; then return; fi
    fi
    say "Python 3.11 or newer is needed, found $($python -V 2>&1); name one with: make setup PYTHON=/path/to/python3.11"
    exit 1
}

# Asks for what is used rather than for a package by name, so that other ways to provide it count as well.
list_missing_packages() {
    command -v c++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        echo "python$version-dev"
    "$python" -c 'import ensurepip' 2>/dev/null || echo "python$version-venv"
    ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || echo postgresql
    # Ubuntu has Chromium as a snap only; Chrome does as well.
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || { grep -qx ID=debian /etc/os-release && echo chromium; } || true
}

find_python
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stamp=.venv/setup-stamp
key=$(cat pyproject.toml constraints.txt .ci/setup.sh | sha256sum | cut -d' ' -f1)-python$version
if [ -x .venv/bin/arat ] && [ "$(cat $stamp 2>/dev/null)" = "$key" ]; then exit 0; fi

missing=$(list_missing_packages)
# shellcheck disable=SC2086  # one word a package
if [ -n "$missing" ]; then install_system_packages $missing; fi

if [ "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]; then
    say "creating .venv with $("$python" -V)"
    "$python" -m venv --clear .venv
fi
rm -f $stamp
say "installing the pinned Python packages into .venv (about 6 GB with CUDA; minutes)"
pip() { .venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }
pip install -c constraints.txt pip setuptools
# Builds are pinned too. DeepSpeed compiles nothing now: its operators would need torch at build time.
DS_BUILD_OPS=0 pip install -c constraints.txt --build-constraint constraints.txt -e '.[dev]'
echo "$key" >$stamp
say "done"
