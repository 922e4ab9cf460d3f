#!/bin/bash
# Draw, refine and judge each of finetune.sh's eight models: an array, a GPU of 24 GB or more each.
#   sbatch configs/slurm/evaluate.sh                       from the repository
#   sbatch --export=ALL,RELEASED=1 configs/slurm/evaluate.sh                   the released models instead, fetched
#     before by `python data.py download --with_checkpoints NAME ..`: nodes may have no internet
#   sbatch --array=4 --gres=gpu:8 configs/slurm/evaluate.sh                    one of them, on eight GPUs
# Task 0-3: one session of subjects 1, 2, 5, 7; task 4-7: forty. recon.py and refine.py go on where they stopped, so
# a short --time and preemption cost a batch.
#SBATCH --job-name=evaluate
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
set -euo pipefail

DATA=${DATA:-$PWD/nsd}
SUBJECTS=(1 2 5 7) SESSIONS=(1 40)
SUBJ=${SUBJECTS[SLURM_ARRAY_TASK_ID % 4]}
SESS=${SESSIONS[SLURM_ARRAY_TASK_ID / 4]}
MODEL=subj0${SUBJ}_pretrained_${SESS}sess
if [ -n "${RELEASED:-}" ]; then
    MODEL=final_${MODEL}_24bs
fi
export HF_HUB_OFFLINE=1

RUN=(--model_name="$MODEL" --data_path="$DATA" --subj="$SUBJ")
accelerate launch --num_processes "${SLURM_GPUS_ON_NODE:-1}" recon.py "${RUN[@]}"
accelerate launch --num_processes "${SLURM_GPUS_ON_NODE:-1}" refine.py "${RUN[@]}"
python evaluate.py "${RUN[@]}"
