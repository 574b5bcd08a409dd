#!/usr/bin/env bash
# The page's tests drive the system's own Chromium; install Debian's where there is none and we may.
set -euo pipefail

for browser in chromium chromium-browser google-chrome; do
    command -v "$browser" > /dev/null && exit 0
done
if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium > /dev/null
else
    echo "The page's tests need Chromium: sudo apt-get install chromium" >&2
    exit 1
fi
