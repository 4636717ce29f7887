#!/usr/bin/env bash
# Makes .venv in the project's root with the versions in requirements/, and the project itself, editable.
# Does nothing when all is in place; goes on where an earlier run was interrupted. Needs Python 3.10 to 3.13 and a
# package registry.
#
#   bash tools/setup_env.sh              # a minute or two, most of it for torch
#   bash tools/setup_env.sh NAME         # .venvs/NAME with the versions in requirements/versions/NAME.txt
#   MMCV_OPS=1 bash tools/setup_env.sh   # compiles mmcv's ops if there is no wheel: about 20 minutes on 2 cores more,
#                                        # and a C++17 compiler
#
# Nothing here calls mmcv's compiled ops, mmseg only imports them: without MMCV_OPS=1, and without a wheel, each of them
# is a function that raises. PYTHON=/path/to/python chooses the interpreter; UV_FIND_LINKS=DIR offers wheels.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=${1:-}
venv=$root/${name:+.venvs/$name}
files=("$root/requirements/versions/$name.txt")
if [[ -z $name ]]; then
  venv=$root/.venv
  files=("$root/requirements/build.txt" "$root/requirements/environment.txt")
fi
versions=${files[-1]}
[[ -f $versions ]] || { echo "setup_env.sh: wanted a file in requirements/versions, got $name" >&2; exit 1; }
ops=${MMCV_OPS:-0}
say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }
stated() { sed -n "s/^# $1: //p" "$versions"; }

import_all='import mmcv.ops, mmseg, mmseg_msvit'
wanted=$(cd "$root" && cat "${files[@]}" setup.py tools/setup_env.sh | cksum)-$ops
if [[ -x $venv/bin/python && "$(cat "$venv/.complete" 2>/dev/null)" == "$wanted" ]] &&
  "$venv/bin/python" -W ignore -c "$import_all" 2>/dev/null; then
  exit 0
fi

read -ra pythons <<<"$(stated python)"
is_version() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] not in '$2'.split())" 2>/dev/null; }
find_python() {
  local version candidate
  for version in "${pythons[@]}"; do
    for candidate in "python$version" python3 python "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      if is_version "$candidate" "$version"; then echo "$candidate"; return; fi
    done
  done
  return 0
}

rm -f "$venv/.complete"
if [[ -x $venv/bin/uv ]] && is_version "$venv/bin/python" "${pythons[*]}"; then
  say "going on with $venv"
else
  python=${PYTHON:-$(find_python)}
  say "virtual environment $venv: a minute or two$([[ $ops == 0 ]] || echo ', and about 20 for the ops without a wheel')"
  if [[ -n $python ]]; then
    is_version "$python" "${pythons[*]}" || { echo "setup_env.sh: wanted Python ${pythons[*]}, got $python" >&2; exit 1; }
    "$python" -m venv --clear "$venv"
  elif command -v uv >/dev/null; then
    say "no Python ${pythons[*]} here: uv fetches one"
    command uv venv --clear --seed --managed-python --python "${pythons[0]}" "$venv"
  else
    echo "setup_env.sh: no Python ${pythons[*]} found: install one, or uv, which fetches it, or name one by PYTHON=..." >&2
    exit 1
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv==0.13.9'
fi
uv() { VIRTUAL_ENV=$venv "$venv/bin/uv" --no-config "$@"; }

# The source stays in the environment, so that a build that was interrupted goes on; -g0 leaves out what debuggers read.
compile_mmcv() {
  local source=$venv/src/mmcv-2.1.0
  if [[ ! -d $source ]]; then
    mkdir -p "$venv/src"
    (cd "$venv/src" && "$venv/bin/python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation \
      'mmcv==2.1.0' && tar xzf mmcv-2.1.0.tar.gz)
  fi
  (cd "$source" && PATH="$venv/bin:$PATH" CFLAGS="-g0 ${CFLAGS:-}" MMCV_WITH_OPS=1 FORCE_CUDA=${FORCE_CUDA:-0} \
    MAX_JOBS=${MAX_JOBS:-$(nproc)} "$venv/bin/python" setup.py bdist_wheel 2>&1) | tee "$venv/mmcv.log" |
    { grep --line-buffered -oE '^\[[0-9]+/[0-9]+\]' || true; } || { tail -n 40 "$venv/mmcv.log" >&2; return 1; }
  uv pip install --no-deps "$source"/dist/mmcv-*.whl
}

if [[ -z $name ]]; then
  say "torch and build tools"
  uv pip install --requirement "${files[0]}"
  if uv pip install --no-build 'mmcv==2.1.0' 2>/dev/null && "$venv/bin/python" -W ignore -c 'import mmcv.ops' 2>/dev/null
  then
    say "mmcv 2.1.0 with its ops, by a wheel"
  elif [[ $ops == 1 ]]; then
    say "mmcv 2.1.0 with its ops, compiled with ${MAX_JOBS:-$(nproc)} jobs: about 20 minutes on 2 cores"
    uv pip uninstall --quiet mmcv mmcv-lite 2>/dev/null || true
    compile_mmcv
  else
    say "mmcv 2.1.0 without its ops (with them by MMCV_OPS=1)"
    uv pip uninstall --quiet mmcv 2>/dev/null || true
    uv pip install --reinstall-package mmcv-lite 'mmcv-lite==2.1.0'
  fi
fi

say "OpenMMLab, tests and pictures"
uv pip install --requirement "$versions"
if [[ -n $(stated no-deps) ]]; then uv pip install --no-deps "$(stated no-deps)"; fi

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if ! compgen -G "$site/mmcv/_ext*.so" >/dev/null; then
  cat >"$site/mmcv/_ext.py" <<'END'
"""In the place of mmcv's compiled ops, which this environment does not have."""


def __getattr__(name):
    if name.startswith('__'):
        raise AttributeError(name)

    def op(*args, **kwargs):
        raise RuntimeError(f'mmcv.ops: {name} is not compiled in this environment: MMCV_OPS=1 bash tools/setup_env.sh')

    return op
END
fi
# mmseg 1.2.2 stops at mmcv 2.2.0, with which it works.
if [[ -n $(ls -d "$site"/mmcv*-2.2.0.dist-info 2>/dev/null) ]]; then
  sed -i "s/MMCV_MAX = '2.2.0'/MMCV_MAX = '2.3.0'/" "$site/mmseg/__init__.py"
fi

say "mmseg_msvit, editable"
uv pip install --no-deps --no-build-isolation --editable "$root"

"$venv/bin/python" -W ignore -c "$import_all"
echo "$wanted" >"$venv/.complete"
say "done"
