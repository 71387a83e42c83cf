#!/bin/sh
# The servers that tests run for real, and the compiler of the CPU's kernels. Installed where we may; else the one command to type is named.
set -eu
missing=""
command -v etcd >/dev/null || missing="$missing etcd-server"
command -v redis-server >/dev/null || missing="$missing redis-server"
command -v promtool >/dev/null || missing="$missing prometheus"
command -v node >/dev/null || missing="$missing nodejs"
command -v npm >/dev/null || missing="$missing npm"
command -v cc >/dev/null || missing="$missing gcc libc6-dev"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "tests need$missing: install them, as in: sudo apt-get install$missing" >&2
    exit 1
fi
