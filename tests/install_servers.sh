#!/usr/bin/env bash
# The tests run the real load balancer and the real Prometheus, make certificates, run the page's curl command, and chaos
# sets the clock; install Debian's packages where something is missing and we may.
set -euo pipefail

missing=()
command -v haproxy > /dev/null || [ -x /usr/sbin/haproxy ] || missing+=(haproxy)
command -v prometheus > /dev/null && command -v promtool > /dev/null || missing+=(prometheus)
for program in curl openssl; do
    command -v "$program" > /dev/null || missing+=("$program")
done
for library in /usr/{lib/*,lib,lib64,local/lib}/faketime/libfaketimeMT.so.1; do
    [ -e "$library" ] && faketime=$library
done
[ -n "${faketime:-}" ] || missing+=(libfaketime)
[ ${#missing[@]} = 0 ] && exit 0
if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    # Programs are wanted, not services: nothing may be started by the installation.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
else
    echo "The tests need HAProxy 2.6 or newer, Prometheus, promtool, curl, openssl and libfaketime:" \
        "sudo apt-get install ${missing[*]}" >&2
    exit 1
fi
