#!/usr/bin/env bash
# Correctness and speed of PPO on one NVIDIA GPU, in under 8 minutes: docs/gpu.md tells what it measures.
#
#   bash benchmarks/gpu.sh [--cpu] [--out FOLDER] [--carried FOLDER] [--seconds N] [SECTION…]
#
# Needs Python 3.12 with torch and transformers, and what benchmarks/gpu_wheels.sh and `python -m benchmarks.gpu.pack`
# put into .gpu; no network. Leaves gpu.json, gpu.md and gpu.log in --out ($OUT, or .gpu/out). Ends with 0 if no
# section failed, 1 if one did, 2 for a bad command line or without a GPU. With --cpu it does everything at tiny sizes without a GPU. RLHF_GPU_PYTHON chooses the Python.
set -uo pipefail
here=$PWD
cd "$(dirname "$0")/.." || exit 2

die() { echo "gpu.sh: $1" >&2; exit 2; }
# Paths that are given belong to the caller's folder, the defaults to the checkout.
absolute() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }

out=$PWD/.gpu/out
[[ -z ${OUT:-} ]] || out=$(absolute "$OUT")
carried=$PWD/.gpu
device=cuda
arguments=()
while (($#)); do
  case $1 in
    --out) (($# > 1)) || die "--out needs a folder"; out=$(absolute "$2"); shift ;;
    --out=*) out=$(absolute "${1#*=}") ;;
    --carried) (($# > 1)) || die "--carried needs a folder"; carried=$(absolute "$2"); shift ;;
    --carried=*) carried=$(absolute "${1#*=}") ;;
    --cpu) device=cpu; arguments+=("$1") ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "benchmarks/gpu.sh"; exit 0 ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[[ ! -e $out || -d $out ]] || die "--out $out is a file; give a folder"

python=${RLHF_GPU_PYTHON:-python3}
if [[ $device == cpu && -z ${RLHF_GPU_PYTHON:-} && -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi
command -v "$python" >/dev/null || die "there is no Python at $python; set RLHF_GPU_PYTHON"
echo "$("$python" -V) at $(command -v "$python")"

site=$(mktemp -d) || exit 2
child=
end() {
  trap '' TERM INT HUP
  # Its sections use the packages in $site until it has ended them.
  [[ -z $child ]] || { kill -TERM "$child" 2>/dev/null; wait "$child"; }
  exit 143
}
trap end TERM INT HUP
trap 'rm -rf "$site"' EXIT
lacking() { "$python" benchmarks/gpu/packages.py "$@"; }

if [[ $(lacking wheels) ]]; then
  if ! compgen -G "$carried/wheels/*.whl" >/dev/null; then
    echo "gpu.sh: no wheels in $carried/wheels; make them with bash benchmarks/gpu_wheels.sh" >&2
  elif ! "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" "$carried"/wheels/*.whl; then
    echo "gpu.sh: the wheels can't be installed into this Python; they are for Python 3.12 on x86-64 Linux" >&2
  fi
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
missing=$(lacking wheels machine machine-tests)
echo "packages missing: ${missing:-none}"

if [[ $device == cpu ]]; then
  export OMP_NUM_THREADS=1 # threads only disturb each other at tiny sizes
fi
export TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$python" -m benchmarks.gpu --out "$out" --carried "$carried" --missing "$missing" ${arguments[@]+"${arguments[@]}"} &
child=$!
wait "$child"
