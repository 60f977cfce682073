#!/usr/bin/env bash
# GLM-5.1-FP8 on 8 x MI355X (gfx950), with the flags and environment of sglang pull request 23562.
# AMD: compile-checked, not run.
# Expect: GSM8K about 0.95 (public: 0.951 with these flags and the stock backend, MI355X TP8, sglang pull request 23562;
# there, 0.942 to 0.953 over repeated runs).
set -euo pipefail
model=zai-org/GLM-5.1-FP8
if [[ "${1:--}" != -* ]]; then model="$1"; shift; fi

export SGLANG_ROCM_FUSED_DECODE_MLA=0            # stock MLA decode fusion, which does not know DSA's cache
export ROCM_QUICK_REDUCE_QUANTIZATION=INT4       # all-reduce of TP8 in four bits: bandwidth between GPUs is the limit
export SAFETENSORS_FAST_GPU=1                    # loads weights straight to the GPUs

args=(
  --model-path "$model" --host 0.0.0.0 --port 30000 --trust-remote-code
  --attention-backend nsa_plugin
  --dsa-prefill-backend tilelang --dsa-decode-backend tilelang  # decides the pool's plain fp8 rows; attention is ours
  --tp 8
  --kv-cache-dtype fp8_e4m3
  --disable-radix-cache           # as in the public measurement, so that figures compare; drop it to reuse prefixes
  --mem-fraction-static 0.85
  --tool-call-parser glm47 --reasoning-parser glm45
  --model-loader-extra-config '{"enable_multithread_load": true, "num_threads": 8}'
)
exec python3 -m sglang.launch_server "${args[@]}" "$@"
