#!/usr/bin/env bash
# Fills .gpu/wheels and .gpu/trl with the wheels that a bare GPU machine lacks: benchmarks/gpu_packages.txt lists them.
#
# For CPython 3.12 on x86-64 Linux, whatever machine this is. Needs pip and PyPI, but only for wheels that are not there
# yet. On the GPU machine, which has no network:
#   python3 -m pip install --no-index --no-deps --target /tmp/site .gpu/wheels/*.whl && export PYTHONPATH=/tmp/site
set -euo pipefail
cd "$(dirname "$0")/.."

LIMIT_MIB=40 # what travels to the machine is limited to 64 MiB, the working tree included
PYTHON=.venv/bin/python
[[ -x $PYTHON ]] || PYTHON=python3

# Requirements of one folder, `name==version`, with names as wheels write them.
requirements() {
  awk -v folder="$1" '
    function wheel_name(name) { gsub(/[-.]+/, "_", name); return tolower(name) }
    /^#/ || !NF { next }
    FNR == NR { split($1, pin, "=="); version[wheel_name(pin[1])] = pin[2]; next }
    $1 != folder { next }
    {
      split($2, pin, "==")
      name = wheel_name(pin[1])
      if (pin[2] == "") pin[2] = version[name]
      if (pin[2] == "") {
        print "gpu_packages.txt: " $2 " has no version, and constraints.txt has none for it" > "/dev/stderr"
        exit 1
      }
      print name "==" pin[2]
    }' constraints.txt benchmarks/gpu_packages.txt
}

# The requirement that a wheel satisfies.
requirement_of() {
  local name version
  IFS=- read -r name version _ <<<"$(basename "$1")"
  echo "${name,,}==$version"
}

# Make a folder hold the wheels of its requirements and nothing else.
fill() {
  local folder=.gpu/$1 incoming=.gpu/incoming wanted missing file
  wanted=$(requirements "$1")
  missing=$wanted
  mkdir -p "$folder"
  for file in "$folder"/*; do
    [[ -e $file ]] || continue
    if grep -qxF -- "$(requirement_of "$file")" <<<"$wanted"; then
      missing=$(grep -vxF -- "$(requirement_of "$file")" <<<"$missing" || true)
    else
      rm -r -- "$file"
    fi
  done
  [[ $missing ]] || return 0
  # Moved when complete: a download that is cut leaves no broken wheel behind.
  rm -rf "$incoming"
  # shellcheck disable=SC2086 # one word for each requirement
  "$PYTHON" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: --dest "$incoming" \
    --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 $missing
  mv -- "$incoming"/*.whl "$folder"
  rmdir "$incoming"
}

fill wheels
fill trl
stat -c '%s %n' .gpu/wheels/*.whl .gpu/trl/*.whl | awk -v limit="$LIMIT_MIB" '
  { total += $1; printf "%7.2f MiB  %s\n", $1 / 2^20, $2 }
  END {
    printf "%7.2f MiB  in all\n", total / 2^20
    if (total > limit * 2^20) {
      print "gpu_wheels.sh: more than " limit " MiB; carry fewer packages" > "/dev/stderr"
      exit 1
    }
  }'
