"""What is a text-to-image network worth to one that draws from tokens? Prints the tables that docs/measured.md quotes.

The toy's SDXL, its text taken out, against the same network from random weights, each trained by unclip.py with the
same flags on the same pictures; and the three ways in which what reads the tokens may start. Pictures:
{--train_logs}/conversion_*/samples.png.

    python tests/bench_conversion.py       after python toy.py, a quarter of an hour on a CPU
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import unclip  # noqa: E402

STEPS = (50, 100, 200, 300, 600)
FLAGS = (f"--num_steps={STEPS[-1]} --ckpt_interval=50 --batch_size=64 --max_lr=1e-3 --warmup=50 --ema=.99 "
         "--prediction=v_prediction --num_eval=300 --scheduler=dpm --steps=6 --guidance=1")
STARTS = {
    "random weights": "--base={toy}/sdxl/unet/config.json --vae={toy}/vae",
    "SDXL, `--new_attention=random`": "--base={toy}/sdxl",
    "SDXL, `--new_attention=zero`": "--base={toy}/sdxl --new_attention=zero",
    "SDXL, `--new_attention=cut`": "--base={toy}/sdxl --new_attention=cut",
    "the shipped decoder, 11,000 steps of 512": "--base={toy}/unclip --num_steps=0",
}
ROWS = {"fid": "FID*", "pixcorr": "PixCorr", "ssim": "SSIM", "alex2": "AlexNet(2)", "alex5": "AlexNet(5)",
        "inception": "Inception", "clip_l": "CLIP", "efficientnet": "EffNet", "swav": "SwAV"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_path", default="toy", help="folder of the toy world")
    parser.add_argument("--train_logs", default="train_logs", help="folder of the runs")
    args = parser.parse_args()
    found = {}
    for i, (start, base) in enumerate(STARTS.items()):
        flags = f"--model_name=conversion_{i} --data_path={args.data_path} --train_logs={args.train_logs} {FLAGS}"
        found[start] = unclip.main([*flags.split(), *base.format(toy=args.data_path).split()])
    print("\n| validation loss after step | " + " | ".join(map(str, STEPS)) + " |\n|---|" + "--:|" * len(STEPS))
    for start, result in found.items():
        if losses := dict(result["history"].get("val/loss", [])):
            print(f"| {start} | " + " | ".join(f"{losses[step]:.3f}" for step in STEPS) + " |")
    print(f"\n| after step {STEPS[-1]} | " + " | ".join(ROWS.values()) + " |\n|---|" + "--:|" * len(ROWS))
    for start, result in found.items():
        print(f"| {start} | " + " | ".join(f"{result['table'][row]:.3f}" for row in ROWS) + " |")
    print("| paper, 30,000 of COCO | " + " | ".join(f"{unclip.PAPER[row]:.3f}" for row in ROWS) + " |")


if __name__ == "__main__":
    main()
