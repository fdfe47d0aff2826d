#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Convert a model, heal the conversion by distillation, verify the result.
#
#   examples/convert_and_heal.sh [SOURCE OUT TEXT HELD_OUT]
#
# SOURCE    folder or Hub id of a model of one of the supported types (docs/families.md)
# OUT       folder for the conversion; the healed model goes to OUT-healed
# TEXT      text like what the model will be used on (.txt, .txt.xz or a data set), to convert and heal with
# HELD_OUT  other such text, to measure on
#
# Without arguments: the bundled model, in little time on a CPU, to ./bundled-mla and ./bundled-mla-healed. Killed or
# interrupted, the same command goes on where it stopped.
set -euo pipefail

if [ $# -eq 0 ]; then
    bundled=$(python -c "import hf_mla_conversion; print(hf_mla_conversion.__path__[0])")/bundled
    set -- "$bundled/model" bundled-mla "$bundled/calibration.txt.xz" "$bundled/validation.txt.xz"
    # A quarter of the cache, in closed form, so that there is something to heal in so few steps.
    convert="--kv-lora-rank 32 --qk-rope-head-dim 16 --steps 0 --calibration-tokens 4096"
    heal="--steps 24 --step-tokens 1024 --learning-rate 2e-4"
    verify="--tokens 4096"
else
    # The share of the cache to keep; the smaller, the more there is to heal.
    convert="--kv-budget 0.3125"
    # 1000 steps of 16,384 tokens on a GPU; more heal more. `--train all` heals most where the cache is smallest, `--train lora`
    # takes the least memory; `--dry-run` says how much.
    heal="--steps 1000 --train attention"
    # With `--max-ratio 1.05` the exit code is 1 if perplexity is more than 5 % above the source's.
    verify="--tokens 98304"
fi
source=$1 out=$2 text=$3 held_out=$4

# shellcheck disable=SC2086 # options are several words
{
    hf-mla convert "$source" "$out" --calibration "$text" --calibration lookups $convert
    # On several GPUs: accelerate launch --config_file examples/heal_accelerate.yaml -m hf_mla_conversion.cli heal ...
    hf-mla heal "$out" "$out-healed" --teacher "$source" --text "$text" --text lookups $heal
    hf-mla verify "$out-healed" --against "$source" --text "$held_out" $verify
}
