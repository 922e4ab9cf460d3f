#!/bin/bash
# The paper's decoder: SDXL learns to draw from image tokens. One node of 8 GPUs of 80 GB.
#   IMAGES='/data/shards/{000..099}.tar' sbatch configs/slurm/unclip.sh       from the repository
#SBATCH --job-name=unclip
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --mem=500G
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

DATA=${DATA:-$PWD/nsd}      # CLIP and the judges: `python data.py download`
IMAGES=${IMAGES:?tars of pictures to learn from}
BASE=${BASE:-$DATA/sd_xl_base_1.0.safetensors}
export HF_HUB_OFFLINE=1     # all is in $DATA

# Preempted, the job comes back by itself and goes on to the same weights.
accelerate launch --config_file configs/multi_gpu.yaml unclip.py --model_name=unclip --cache_dir="$DATA" \
    --images="$IMAGES" --base="$BASE" --num_steps=110000 --batch_size=8 --resolution=256 --draw_size=768 \
    --max_lr=1e-5 --warmup=1000 --offset_noise=.04
