# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Shared by scripts/demo and scripts/test: make or refresh .venv of this checkout.
#
# ensure_venv NAME   afterwards .venv/bin/infertune and everything in requirements.lock are there.
# Safe with two runs at once, idempotent (a stamp), and it repairs a broken .venv.

say() { printf '%s\n' "$*"; }
fail() {
    printf '%s: %s\n' "$SCRIPT" "$1" >&2
    shift
    for line in "$@"; do printf '  %s\n' "$line" >&2; done
    exit 1
}

# A Python that is new enough and can make a virtual environment, or nothing.
find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        # Asked, not believed: a version manager's shim exists but does not run.
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
}

# as_root_install "DEBIAN NAMES" "FEDORA NAMES" "ARCH NAMES": quiet unless it fails.
as_root_install() {
    local log
    log=$(mktemp)
    if ! install_packages "$@" >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

install_packages() {
    # The lists are words on purpose.
    # shellcheck disable=SC2086
    if command -v apt-get >/dev/null; then
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $1
    elif command -v dnf >/dev/null; then
        dnf install -q -y $2
    elif command -v pacman >/dev/null; then
        pacman -Sy --noconfirm --needed $3
    else
        echo "none of apt-get, dnf, pacman is here"
        return 1
    fi
}

require_python() { # sets PYTHON
    PYTHON=$(find_python)
    [ -z "$PYTHON" ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        fail "no Python >= 3.11 with venv here" \
            "Debian, Ubuntu: apt-get install python3-venv   Fedora: dnf install python3" \
            "Arch: pacman -S python   (as root; or run this script once as root)"
    fi
    say "$SCRIPT: installing Python"
    as_root_install "python3 python3-venv ca-certificates" python3 python || true
    PYTHON=$(find_python)
    [ -z "$PYTHON" ] || return 0
    # Where the default Python is too old (Ubuntu 22.04, EL 9) a newer one has its own name.
    as_root_install "python3.11 python3.11-venv" python3.11 python || true
    PYTHON=$(find_python)
    [ -n "$PYTHON" ] || fail "could not install a Python >= 3.11 with venv"
}

embedded_loads() { .venv/bin/python -c 'import xllamacpp' >/dev/null 2>&1; }

# The wheel of llama.cpp brings everything but GCC's OpenMP library.
require_embedded() {
    embedded_loads && return
    if [ "$(id -u)" -eq 0 ]; then
        say "$SCRIPT: installing GCC's OpenMP library, which the embedded server needs"
        as_root_install libgomp1 libgomp gcc-libs || true
        embedded_loads && return
    fi
    say "$SCRIPT: out of reach here: the embedded server (it needs libgomp.so.1; as root:" \
        "apt-get install libgomp1, dnf install libgomp, pacman -S gcc-libs)"
}

# Compiled probes of this checkout, in build/probes.  A compiler is installed on first need.
ensure_probes() {
    .venv/bin/python hatch_build.py 2>/dev/null && return
    if [ "$(id -u)" -eq 0 ]; then
        say "$SCRIPT: installing clang and libbpf, which the probes are compiled with"
        as_root_install "clang llvm libbpf-dev libbpf1" "clang llvm libbpf-devel libbpf" \
            "clang llvm libbpf" || true
    fi
    .venv/bin/python hatch_build.py || say "$SCRIPT: without them the probes cannot be tested"
}

wanted_stamp() {
    { cat requirements.lock pyproject.toml; echo "$PWD"; "$PYTHON" -VV; } | sha256sum
}

venv_is_good() {
    [ "$(cat .venv/stamp 2>/dev/null)" = "$(wanted_stamp)" ] &&
        .venv/bin/infertune --version >/dev/null 2>&1 &&
        .venv/bin/python -c 'import pytest' >/dev/null 2>&1
}

pip_install() { # ARGUMENTS...  (output only when it fails)
    .venv/bin/python -m pip --disable-pip-version-check --retries 2 install --quiet --no-input "$@"
}

build_venv() {
    say "$SCRIPT: preparing .venv with $("$PYTHON" -V) (300 MB to fetch the first time)"
    rm -rf .venv || fail "cannot replace .venv: it belongs to someone else"
    "$PYTHON" -m venv .venv
    local log=.venv/install.log
    if pip_install --require-hashes --only-binary :all: -r requirements.lock >"$log" 2>&1; then
        # hatchling is in the lock, so nothing unpinned is fetched to build the package.
        pip_install --no-deps --no-build-isolation --editable . >"$log" 2>&1 ||
            { cat "$log" >&2; fail "could not install infertune itself"; }
    elif grep -q "DO NOT MATCH THE HASHES" "$log"; then
        cat "$log" >&2
        fail "a downloaded package is not the one that was locked; nothing of it was installed"
    else
        tail -n 3 "$log" >&2
        say "$SCRIPT: the locked packages do not install here; taking the newest that do"
        pip_install --editable '.[dev,daemon,exporter,embedded]' >"$log" 2>&1 ||
            pip_install --editable '.[dev,daemon,exporter]' >"$log" 2>&1 ||
            { tail -n 5 "$log" >&2; fail "pip could not install what is needed (is there a network?)"; }
    fi
    wanted_stamp >.venv/stamp
}

take_lock() { # -s or -x, on descriptor 9
    flock -n "$1" 9 && return
    say "$SCRIPT: waiting for another run in this checkout"
    flock "$1" 9
}

ensure_venv() {
    require_python
    if ! [ -w . ]; then
        venv_is_good && { require_embedded; return; }
        fail "$PWD is not yours to write, and its .venv is not ready" \
            "clone the repository again as $(id -un), or run this once as the owner"
    fi
    # Shared while in use, exclusive while building: a second run waits instead of
    # pulling the packages away under the first.
    exec 9<. # the lock is on the directory itself: no file to leave behind
    take_lock -s
    until venv_is_good; do
        take_lock -x
        venv_is_good || build_venv
        take_lock -s
    done
    ensure_probes
    require_embedded
}
