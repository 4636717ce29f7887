#!/usr/bin/env bash
# The fast tests with another set of versions, in an environment of its own.
#
#   bash tools/test_versions.sh NAME [arguments of pytest]   # NAME of requirements/versions/NAME.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?$(echo && cd requirements/versions && echo wanted one of *.txt)}
shift
bash tools/setup_env.sh "$name"
source ".venvs/$name/bin/activate"
python -m pytest -m 'not slow' "$@"
