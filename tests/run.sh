#!/usr/bin/env bash
# Installs what the tests need and runs the whole suite. Arguments go to pytest: bash tests/run.sh -k browser
set -euo pipefail
cd "$(dirname "$0")/.."
cache=$PWD/tests/.cache
mkdir -p "$cache"

# Inside a virtual environment that one is used; else the tests keep one of their own.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x "$cache/venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$cache/venv"
  export PATH="$cache/venv/bin:$PATH"
fi
python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'

echo "Installing Python packages ..."
python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt

# A browser: the one that is present, else the system's package manager, else Playwright's own download.
find_chromium() {
  for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v "$name" && return; done
  python -c 'from playwright.sync_api import sync_playwright as s; import os
with s() as p: print(p.chromium.executable_path) if os.path.exists(p.chromium.executable_path) else exit(1)'
}
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
if ! chromium=$(find_chromium); then
  echo "Installing Chromium ..."
  if command -v apt-get >/dev/null && as_root apt-get update -qq && as_root apt-get install -y -qq chromium >/dev/null; then :
  elif command -v dnf >/dev/null && as_root dnf install -y -q chromium; then :
  else python -m playwright install --with-deps chromium; fi
  chromium=$(find_chromium)
fi
export QLORA_UI_CHROMIUM=$chromium

echo "Fetching the starter model ..."
export QLORA_UI_STARTER=$cache/models
PYTHONPATH=. python tests/fetch_starter.py "$QLORA_UI_STARTER"

# As many workers as cores; a file of tests stays with one of them, and the slow ones begin. Tests of one GPU take turns (tests/conftest.py).
exec python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
