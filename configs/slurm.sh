#!/bin/bash
# The paper's two runs on one node of 8 GPUs: pretrain on everybody but one subject, then fine-tune on that one.
#   sbatch configs/slurm.sh          (from the repository; DATA and SUBJ below may be set in the environment)
#SBATCH --job-name=mindeye2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --mem=500G
#SBATCH --time=72:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail

DATA=${DATA:-$PWD/nsd}     # folder of the dataset, see README.md
SUBJ=${SUBJ:-1}            # left out of pretraining, then learned
SESSIONS=${SESSIONS:-1}    # hours of SUBJ's data: 1 or 40 in the paper
PAPER="--max_lr=3e-4 --mixup_pct=.33 --num_epochs=150 --use_prior --prior_scale=30 --clip_scale=1
       --blurry_recon --blur_scale=.5 --no-use_image_aug --n_blocks=4 --hidden_dim=4096"

# --batch_size is for each GPU. 42 = 6 trials of each of 7 subjects, on each of the paper's 8 GPUs.
accelerate launch --config_file configs/deepspeed_zero2.yaml train.py --data_path="$DATA" \
    --model_name="multisubject_subj0$SUBJ" --multi_subject --subj="$SUBJ" --num_sessions=40 --batch_size=42 $PAPER

accelerate launch --config_file configs/one_gpu.yaml train.py --data_path="$DATA" \
    --model_name="subj0${SUBJ}_pretrained_${SESSIONS}sess" --no-multi_subject --subj="$SUBJ" \
    --num_sessions="$SESSIONS" --batch_size=24 --multisubject_ckpt="train_logs/multisubject_subj0$SUBJ" $PAPER
