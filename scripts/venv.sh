# Sourced by the other scripts: makes .venv in the project's folder where there is none, and installs the project.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    echo "making .venv (once)"
    "${PYTHON:-python3}" -m venv .venv
fi
# again only where the project's own list of requirements has changed
stamp=.venv/.installed-from
if ! cmp --silent pyproject.toml "$stamp"; then
    echo "installing the project and its requirements into .venv (once; torch is a large download)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    cp pyproject.toml "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
