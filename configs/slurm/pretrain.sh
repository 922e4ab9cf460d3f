#!/bin/bash
# The paper's pretraining, on everybody but one subject: one node of 8 GPUs of 48 GB or more.
#   sbatch configs/slurm/pretrain.sh                       from the repository; subject 1 is left out
#   sbatch --export=ALL,SUBJ=5,DATA=/data/nsd configs/slurm/pretrain.sh
# Then configs/slurm/finetune.sh. With more nodes: pretrain_multinode.sh.
#SBATCH --job-name=pretrain
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

DATA=${DATA:-$PWD/nsd}      # what `python data.py download --subjects 1 2 3 4 5 6 7 8` has filled
SUBJ=${SUBJ:-1}             # left out
export HF_HUB_OFFLINE=1     # all is in $DATA
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True  # 40 GiB must fit 48

# Preempted, the job comes back by itself and goes on from last.pth (--resume); so does one sent again after its time.
# --batch_size is for each GPU. 42 = 6 trials of each of 7 subjects, so 336 in all. On two GPUs, deepspeed_zero2.yaml
# without --compile took 32 GiB each in place of 40, and twice the time.
accelerate launch --config_file configs/multi_gpu.yaml train.py --data_path="$DATA" \
    --model_name="multisubject_subj0$SUBJ" --multi_subject --subj="$SUBJ" --num_sessions=40 --batch_size=42 \
    --max_lr=3e-4 --mixup_pct=.33 --num_epochs=150 --use_prior --prior_scale=30 --clip_scale=1 \
    --blurry_recon --blur_scale=.5 --no-use_image_aug --n_blocks=4 --hidden_dim=4096 --compile --resume
