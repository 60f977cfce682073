#!/usr/bin/env bash
# GLM-5.x-FP8 on 8 x H200.
# Not run here: no host with eight GPUs and these weights was at hand.
# Expect: GSM8K about 0.95 (public: GLM-5.1-FP8 0.951, 8 x MI355X, sglang pull request 23562). Measure your own with
#   nsa-plugin gsm8k --base-url http://127.0.0.1:30000 --data-path test.jsonl
set -euo pipefail
model=zai-org/GLM-5.1-FP8
if [[ "${1:--}" != -* ]]; then model="$1"; shift; fi

args=(
  --model-path "$model" --host 0.0.0.0 --port 30000
  --attention-backend nsa_plugin
  --tp 8                          # 8 of 64 query heads per GPU: our kernels run 8, they are not padded to 64
  --kv-cache-dtype fp8_e4m3       # 656-byte latent rows instead of 1152: nearly twice the context
  --mem-fraction-static 0.85      # weights and cache; the rest is for activations and CUDA graphs
  --tool-call-parser glm47 --reasoning-parser glm45
  --model-loader-extra-config '{"enable_multithread_load": true, "num_threads": 8}'  # minutes less to load
)
exec python3 -m sglang.launch_server "${args[@]}" "$@"
