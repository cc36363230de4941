#!/usr/bin/env bash
# Make the documentation site in site/, notebooks executed: bash scripts/docs.sh [options of sphinx-build]
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec python -m sphinx --fail-on-warning --keep-going -b html "$@" docs site
