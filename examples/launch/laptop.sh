#!/usr/bin/env bash
# The tiny DSA model on a laptop's CPU; `make demo` does the same and asks it questions.
# Run in continuous integration (these arguments, through the tests' own server).
# Expect: healthy in 20 to 40 seconds on two cores, about 1.7 GB of memory.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
model="$root/examples/models/tiny-dsa"
if [[ "${1:--}" != -* ]]; then model="$1"; shift; fi

# The active environment's Python if that has SGLang, else the one that `make setup` creates.
python=python3
if ! "$python" -c 'import sys, importlib.util; sys.exit(importlib.util.find_spec("sglang") is None)'; then
  python="$root/.venv/bin/python"
  [[ -x "$python" ]] || { echo "laptop.sh: python3 has no sglang and $python does not exist: run make setup" >&2; exit 1; }
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

args=(
  --model-path "$model" --host 127.0.0.1 --port 30000
  --device cpu                    # with nsa_plugin this selects the plugin's CPU platform: plain torch, no sgl_kernel
  --attention-backend nsa_plugin
  --sampling-backend pytorch      # the default one needs a GPU
  --disable-cuda-graph
  --max-total-tokens 8192         # a small cache: by default SGLang claims most of the memory
  --max-running-requests 8
)
exec "$python" -m sglang.launch_server "${args[@]}" "$@"
