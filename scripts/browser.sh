#!/usr/bin/env bash
# Installs Debian's chromium and its driver, for the browser tests, unless they are installed.
# Usage: scripts/browser.sh
set -euo pipefail

has() { command -v "$1" >/dev/null; }

fail() {
  printf '%s\n' "$1" >&2
  exit 1
}

has chromium && has chromedriver && exit 0
has apt-get || fail "chromium or chromedriver is missing: install both, then repeat the command"
as_root=()
if [[ $(id -u) -ne 0 ]]; then
  has sudo || fail "chromium is missing: as root run apt-get install chromium chromium-driver"
  as_root=(sudo)
fi
echo "installing chromium and chromium-driver"
export DEBIAN_FRONTEND=noninteractive
${as_root[@]+"${as_root[@]}"} apt-get update -qq
${as_root[@]+"${as_root[@]}"} apt-get install -y -qq --no-install-recommends chromium chromium-driver
