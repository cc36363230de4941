#!/usr/bin/env bash
# Train on the embedded digits, evaluate the bound, draw samples: bash scripts/quickstart.sh [folder]
# Run it again and it goes on from the last checkpoint; a finished run is only evaluated and sampled.
run_dir=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/quickstart}")
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

resume=()
if [ -f "$run_dir/checkpoints/last.ckpt" ]; then
    resume=(--ckpt_path last)
fi
ddpm fit -c configs/quickstart.yaml --run_dir "$run_dir" ${resume[@]+"${resume[@]}"}
ddpm test -c "$run_dir/config.yaml" --run_dir "$run_dir" --ckpt_path last
ddpm sample -c "$run_dir/config.yaml" --run_dir "$run_dir" --ckpt_path last --n 64

echo
echo "everything is in $run_dir"
echo "  samples.png         64 samples"
echo "  bound-test.txt      the bound, term by term"
echo "  checkpoints/        last.ckpt and best.ckpt"
echo "  TensorBoard:        .venv/bin/tensorboard --logdir $run_dir"
