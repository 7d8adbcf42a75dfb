#!/usr/bin/env bash
# Pin the target's Python libraries with the hashes of every platform's files, for Python 3.10 and newer.
# Needs uv. Run it when roles/prerequisites/files/requirements.in changes or a library has a new release.
set -euo pipefail
cd "$(dirname "$0")/../../roles/prerequisites/files"
# The machine's own pip settings must not put hashes of local builds into the file.
env -u PIP_FIND_LINKS -u UV_FIND_LINKS uv --no-config pip compile --quiet --upgrade --universal --python-version 3.10 \
    --generate-hashes --no-emit-index-url --no-emit-find-links --no-emit-package tzdata \
    --custom-compile-command tests/tools/lock_requirements.sh requirements.in --output-file requirements.txt
