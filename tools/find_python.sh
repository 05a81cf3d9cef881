#!/bin/sh
# Prints the Python interpreter to build with, or says in a sentence what is missing and how to get it.
#
#   tools/find_python.sh [INTERPRETER]     the interpreter to take; without it the best of the candidates below
#
# Needed on any machine: Python 3.10 to 3.13 with venv and the headers, a C++ compiler, libnuma.
set -eu

# 3.11 and 3.12 first: for these there are CPU builds of torch and wheels of everything that vLLM needs.
candidates=${1:-python3.11 python3.12 python3 python3.13 python3.10}

fail() {
    printf 'vllm-spark: %s\n' "$1" >&2
    exit 1
}

# Prints nothing if the interpreter $1 will do, else why not. A name on the PATH may be a shim of a version
# manager that has no such version, so each is run.
problem_of() {
    command -v "$1" >/dev/null 2>&1 || { echo "$1 was not found"; return; }
    "$1" - <<'PYTHON' 2>/dev/null || echo "$1 does not run"
import importlib.util, os, sys, sysconfig
name, version = sys.executable, "%d.%d" % sys.version_info[:2]
if not (3, 10) <= sys.version_info[:2] < (3, 14):
    print("%s is Python %s, and 3.10 to 3.13 are needed" % (name, version))
elif any(importlib.util.find_spec(module) is None for module in ("venv", "ensurepip")):
    print("%s cannot make virtual environments; install python%s-venv (Debian: apt-get install python%s-venv)"
          % (name, version, version))
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("%s has no Python.h; install its headers (Debian: apt-get install python%s-dev)" % (name, version))
PYTHON
}

first_problem=
python=
for candidate in $candidates; do
    problem=$(problem_of "$candidate")
    if [ -z "$problem" ]; then
        python=$candidate
        break
    fi
    # "Not found" is said only if nothing better is known: an interpreter that lacks a part is nearer.
    case $problem in
        *"was not found" | *"does not run") ;;
        *) first_problem=${first_problem:-$problem} ;;
    esac
done
if [ -z "$python" ]; then
    [ -n "${1:-}" ] && fail "$problem; name another with make PYTHON=..., or leave it out."
    fail "${first_problem:-no Python 3.10 to 3.13 was found; install one (Debian: apt-get install python3 python3-venv python3-dev), or name yours with make PYTHON=...}."
fi

command -v "${CXX:-g++}" >/dev/null 2>&1 ||
    fail "the C++ compiler ${CXX:-g++} was not found; install one (Debian: apt-get install g++), or name yours with CXX=... ."

"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    fail "libnuma.so.1 is missing, which vLLM's CPU build needs; install it (Debian: apt-get install libnuma1)."

command -v "$python"
