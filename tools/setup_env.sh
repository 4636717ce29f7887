#!/usr/bin/env bash
# Makes .venv in the project's root with the versions in requirements/, and the project itself, editable.
# Does nothing when all is in place. Needs Python 3.11, a C++17 compiler and a package registry.
#
#   bash tools/setup_env.sh              # about one minute where a wheel of mmcv is to be had,
#                                        # about 20 minutes on 2 cores where its ops must be compiled
#
# PYTHON=/path/to/python3.11 chooses the interpreter; UV_FIND_LINKS=DIR offers wheels that you have built already.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }

wanted=$(cd "$root" && cat requirements/*.txt setup.py tools/setup_env.sh | cksum)
if [[ -x $venv/bin/python && "$(cat "$venv/.complete" 2>/dev/null)" == "$wanted" ]] &&
  "$venv/bin/python" -c 'import mmcv.ops, mmseg, mmseg_msvit' 2>/dev/null; then
  exit 0
fi

python=${PYTHON:-}
for candidate in python3.11 python3 python; do
  [[ -n $python ]] && break
  if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then python=$candidate; fi
done
[[ -n $python ]] || { echo "setup_env.sh: no Python 3.11 found: install it, or name one by PYTHON=..." >&2; exit 1; }

say "virtual environment $venv (about one minute, plus about 20 where mmcv must be compiled)"
rm -f "$venv/.complete"
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv==0.13.9'
uv() { VIRTUAL_ENV=$venv "$venv/bin/uv" --no-config "$@"; }

say "torch and build tools"
uv pip install --requirement "$root/requirements/build.txt"

say "mmcv 2.1.0 with its ops: a wheel if there is one, else compiled with $(nproc) jobs"
MMCV_WITH_OPS=1 FORCE_CUDA=${FORCE_CUDA:-0} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
  uv pip install --no-build-isolation 'mmcv==2.1.0'

say "OpenMMLab, tests and pictures"
uv pip install --requirement "$root/requirements/environment.txt"
uv pip install --no-deps 'openmim==0.3.9'

say "mmseg_msvit, editable"
uv pip install --no-deps --no-build-isolation --editable "$root"

"$venv/bin/python" -c 'import mmcv.ops, mmseg, mmseg_msvit'
echo "$wanted" >"$venv/.complete"
say "done"
