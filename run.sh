#!/usr/bin/env bash
# DeepServe's one entry. Sets up what is missing, then runs.
#   ./run.sh [MODEL] [flags]     serve (also: ./run.sh serve ...)
#   ./run.sh setup [--torch-index URL]   only set up; take torch's small CPU build from another index
#   ./run.sh test | lint | bench ... | profile | simulate | doctor | chat | ps | pull NAME | config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=.venv
py=$venv/bin/python
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # torch-npu, where it is installed, is imported by --device npu and by nothing else

say() { printf 'deepserve: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

find_python() { # the first Python of 3.11 or newer
  for p in ${PYTHON:-} python3.11 python3 python3.13 python3.12 python; do
    command -v "$p" >/dev/null 2>&1 && "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$p"; return; }
  done
  die "Python 3.11 or newer is missing: install it (for example: apt install python3.11 python3.11-venv) or name it in PYTHON"
}

make_venv() {
  local python site=()
  python=$(find_python)
  # A torch that the system already has is worth seeing, but only the very version: another one would be in the way.
  "$python" -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != "2.13.0")' 2>/dev/null && site=(--system-site-packages)
  say "making $venv with $("$python" --version 2>&1)${site:+, seeing the system packages for their torch 2.13.0}"
  "$python" -m venv "${site[@]}" $venv || { rm -rf $venv; die "Python's venv module is missing: install it (for example: apt install python3-venv)"; }
}

on_ascend() { # a driver, and CANN: where its set_env.sh says, or in a usual place
  [ -e /usr/local/Ascend/driver ] || return 1
  [ -d "${ASCEND_HOME_PATH:-/usr/local/Ascend/ascend-toolkit/latest}" ] || [ -d /usr/local/Ascend/cann ]
}

cann_environment() { # what CANN's libraries need, where the caller has not sourced it
  local home
  for home in "${ASCEND_HOME_PATH:-}" /usr/local/Ascend/ascend-toolkit /usr/local/Ascend/cann; do
    if [ -n "$home" ] && [ -f "$home/set_env.sh" ]; then
      set +eu # CANN's script reads variables that may not be set
      . "$home/set_env.sh"
      set -eu
      return
    fi
  done
}

install() { # install <requirements file>: once for each content of the file
  local stamp=$venv/.installed-$1
  cmp -s "$1" "$stamp" && return
  say "installing $1 (the first time this takes a few minutes)"
  $py -m pip install --quiet --disable-pip-version-check -r "$1" || die "pip could not install $1: see above"
  cp "$1" "$stamp"
}

setup() {
  [ -x $py ] || make_venv
  if [ "${1:-}" = --torch-index ]; then
    say "installing torch from ${2:?--torch-index needs a URL}"
    $py -m pip install --quiet --disable-pip-version-check --index-url "$2" "$(grep -o '^torch==[^ ]*' requirements.txt)" || die "pip could not install torch from $2"
  fi
  install requirements.txt
  if on_ascend; then
    install requirements-npu.txt
    case ":${LD_LIBRARY_PATH:-}:" in *Ascend* | *cann*) ;; *) cann_environment ;; esac
  fi
  compgen -G "engine/native/build/deepserve-cpu-*.so" >/dev/null || $py -m engine.native >&2
}

command=serve
case "${1:-}" in serve | setup | test | lint | bench | doctor | chat | ps | pull | config | profile | simulate) command=$1; shift ;; esac
case "$command" in
  setup) setup "$@" && say "ready: ./run.sh" ;;
  test) setup && install requirements-test.txt && exec $py -m pytest "$@" ;;
  lint) setup && install requirements-test.txt && $py -m ruff check . && $py -m ruff format --check . && exec $py -m mypy ;;
  *) setup && exec $py deepserve.py "$command" "$@" ;;
esac
