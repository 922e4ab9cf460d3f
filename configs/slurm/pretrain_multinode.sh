#!/bin/bash
# The paper's pretraining on several nodes of 8 GPUs: the same 48 trials of each subject at a step, on more GPUs.
#   sbatch --nodes=2 configs/slurm/pretrain_multinode.sh   from the repository; 2, 3 or 6 nodes share 48 evenly
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --mem=500G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

export DATA=${DATA:-$PWD/nsd}   # on a disk that all nodes see, and so is the repository
export SUBJ=${SUBJ:-1}          # left out
export HF_HUB_OFFLINE=1
export GPUS=$((8 * SLURM_NNODES))
EACH=$((48 / GPUS))
export BATCH=$((7 * EACH))      # trials a GPU: 21 on 2 nodes
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HEAD=${HOSTS[0]} PORT=$((20000 + SLURM_JOB_ID % 20000))  # of this job alone, should two share a node

# Runs once on each node: only there is SLURM_NODEID known. "standard": srun has started us, DeepSpeed need not.
launch() {
    accelerate launch --config_file configs/deepspeed_zero2.yaml --deepspeed_multinode_launcher standard \
        --num_machines "$SLURM_NNODES" --num_processes "$GPUS" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$HEAD" --main_process_port "$PORT" train.py --data_path="$DATA" \
        --model_name="multisubject_subj0$SUBJ" --multi_subject --subj="$SUBJ" --num_sessions=40 \
        --batch_size="$BATCH" --max_lr=3e-4 --mixup_pct=.33 --num_epochs=150 --use_prior --prior_scale=30 \
        --clip_scale=1 --blurry_recon --blur_scale=.5 --no-use_image_aug --n_blocks=4 --hidden_dim=4096 --resume
}
export -f launch
srun --kill-on-bad-exit=1 bash -c launch
