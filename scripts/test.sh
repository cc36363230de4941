#!/usr/bin/env bash
# Run the whole test suite: bash scripts/test.sh [pytest options]
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
exec python -m pytest "$@"
