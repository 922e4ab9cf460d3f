#!/bin/bash
# The paper's eight fine-tunings, an array: subjects 1, 2, 5, 7 with one session and with forty, a GPU of 48 GB each.
#   sbatch configs/slurm/finetune.sh                       from the repository, after pretrain.sh of each subject
#   sbatch --array=0 --dependency=afterok:JOB configs/slurm/finetune.sh        subject 1, one session, after job JOB
#   sbatch --export=ALL,PRETRAINED=final_multisubject configs/slurm/finetune.sh        from the released models, fetched
#     before by `python data.py download --with_checkpoints final_multisubject_subj01 ..`
# Task 0-3: one session of subjects 1, 2, 5, 7; task 4-7: forty.
#SBATCH --job-name=finetune
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=100G
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
set -euo pipefail

DATA=${DATA:-$PWD/nsd}
PRETRAINED=${PRETRAINED:-multisubject}  # starts from train_logs/${PRETRAINED}_subj0N, which pretrain.sh makes
SUBJECTS=(1 2 5 7) SESSIONS=(1 40)
SUBJ=${SUBJECTS[SLURM_ARRAY_TASK_ID % 4]}
SESS=${SESSIONS[SLURM_ARRAY_TASK_ID / 4]}
export HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True  # memory in pieces that grow: it fits 48 GB

accelerate launch --config_file configs/one_gpu.yaml train.py --data_path="$DATA" \
    --model_name="subj0${SUBJ}_pretrained_${SESS}sess" --no-multi_subject --subj="$SUBJ" --num_sessions="$SESS" \
    --batch_size=24 --multisubject_ckpt="train_logs/${PRETRAINED}_subj0$SUBJ" \
    --max_lr=3e-4 --mixup_pct=.33 --num_epochs=150 --use_prior --prior_scale=30 --clip_scale=1 \
    --blurry_recon --blur_scale=.5 --no-use_image_aug --n_blocks=4 --hidden_dim=4096 --resume
