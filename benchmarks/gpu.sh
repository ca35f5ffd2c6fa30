#!/usr/bin/env bash
# Correctness and speed of PPO on one NVIDIA GPU, in under 8 minutes: docs/gpu.md tells what it measures.
#
#   bash benchmarks/gpu.sh [--cpu] [--out FOLDER] [--carried FOLDER] [--seconds N] [SECTION…]
#
# Needs Python 3.12 with torch and transformers, and what benchmarks/gpu_wheels.sh and `python -m benchmarks.gpu.pack`
# put into .gpu; no network. Leaves gpu.json, gpu.md and gpu.log in --out ($OUT, or .gpu/out). Ends with 0 if all
# sections are ok. With --cpu it does everything at tiny sizes without a GPU. RLHF_GPU_PYTHON chooses the Python.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-.gpu/out}
carried=.gpu
device=cuda
arguments=()
while (($#)); do
  case $1 in
    --out) out=$2; shift ;;
    --carried) carried=$2; shift ;;
    --cpu) device=cpu; arguments+=("$1") ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

python=${RLHF_GPU_PYTHON:-python3}
if [[ $device == cpu && -z ${RLHF_GPU_PYTHON:-} && -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
lacking() { "$python" benchmarks/gpu/packages.py wheels machine machine-tests; }

if [[ $(lacking) ]]; then
  if compgen -G "$carried/wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
      --target "$site" "$carried"/wheels/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  else
    echo "gpu.sh: no wheels in $carried/wheels; make them with bash benchmarks/gpu_wheels.sh" >&2
  fi
fi
missing=$(lacking)
echo "packages missing: ${missing:-none}"

if [[ $device == cpu ]]; then
  export OMP_NUM_THREADS=1 # threads only disturb each other at tiny sizes
fi
export TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$python" -m benchmarks.gpu --out "$out" --carried "$carried" --missing "$missing" "${arguments[@]}"
