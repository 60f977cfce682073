#!/usr/bin/env bash
# The tiny DSA model on a laptop's CPU; `make demo` does the same and asks it questions.
# Run in continuous integration (these arguments, through the tests' own server).
# Expect: healthy in 20 to 40 seconds on two cores, about 1.7 GB of memory.
set -euo pipefail
cd "$(dirname "$0")/../.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

args=(
  --model-path "${1:-examples/models/tiny-dsa}" --host 127.0.0.1 --port 30000
  --device cpu                    # with nsa_plugin this selects the plugin's CPU platform: plain torch, no sgl_kernel
  --attention-backend nsa_plugin
  --sampling-backend pytorch      # the default one needs a GPU
  --disable-cuda-graph
  --max-total-tokens 8192         # a small cache: by default SGLang claims most of the memory
  --max-running-requests 8
)
exec python3 -m sglang.launch_server "${args[@]}"
