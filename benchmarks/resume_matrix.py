"""Resume runs of many sets of options in the middle, and compare their last checkpoint with the uninterrupted run's.

python benchmarks/resume_matrix.py [--only NAME ...]      writes benchmarks/results/resume_matrix.json
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import tiny_run
import torch

from pointalign import storage

RESULTS = Path(__file__).parent / "results" / "resume_matrix.json"
STEPS = 6
OPTIONS: dict[str, list[str]] = {
    "defaults": [],
    "optimizer: AdamW, fused": ["--training.optim", "adamw_torch_fused"],
    "optimizer: Adafactor": ["--training.optim", "adafactor"],
    "optimizer: 8-bit AdamW": ["--training.optim", "adamw_8bit"],
    "optimizer: paged 8-bit AdamW": ["--training.optim", "paged_adamw_8bit"],
    "optimizer: 8-bit Lion": ["--training.optim", "lion_8bit"],
    "optimizer: SGD": ["--training.optim", "sgd"],
    "optimizer: Adagrad": ["--training.optim", "adagrad"],
    "optimizer: RMSprop": ["--training.optim", "rmsprop"],
    "schedule: cosine": ["--training.lr_scheduler_type", "cosine"],
    "schedule: linear with warm-up": ["--training.lr_scheduler_type", "linear", "--training.warmup_steps", "2"],
    "schedule: as published": ["--training.minimum_learning_rate", "1e-5", "--training.warmup_steps", "2"],
    "weight decay, no clipping": ["--training.weight_decay", "0.1", "--training.max_grad_norm", "0"],
    "accumulation": ["--training.gradient_accumulation_steps", "2"],
    "bfloat16": ["--model.dtype", "bfloat16"],
    "4-bit language model": ["--model.quantization", "nf4"],
    "activation checkpointing": ["--training.activation_checkpointing", "true"],
    "augmentation": ["--data.augmentation", "true"],
    "packing": ["--data.packing", "true"],
    "packing by tokens": ["--data.packing", "true", "--data.pack_tokens", "600"],
    "one data worker": ["--training.dataloader_num_workers", "1"],
    "two data workers, augmentation": ["--training.dataloader_num_workers", "2", "--data.augmentation", "true"],
    "persistent workers": [
        "--training.dataloader_num_workers", "1", "--training.dataloader_persistent_workers", "true",
    ],
    "cached views": ["--data.views", "4"],
    "point branch trains": ["--model.train", "[point_mlp, qformer, modality_projector, lora]"],
    "point branch at its own rate": [
        "--model.train", "[point_mlp, qformer, lora]", "--training.point_learning_rate", "1e-4",
    ],
    "all of the point branch": ["--model.train", "[point_encoder, point_mlp, qformer, modality_projector, lora]"],
    "no alignment": ["--alignment.weight", "0"],
    "alignment to the encoder": ["--alignment.target", "encoder"],
    "sequential order": ["--training.train_sampling_strategy", "sequential"],
    "another data seed": ["--training.data_seed", "7"],
    "fused": ["--fused"],
    "batches that fit": ["--training.auto_batch", "true"],
}  # fmt: skip


def compare(arguments: list[str], folder: Path) -> dict:
    """Train, then train again from the checkpoint in the middle: what differs at the end."""
    log, whole, half = folder / "log.txt", folder / "whole", folder / "half"
    arguments = [*arguments, "--training.max_steps", str(STEPS), "--training.save_steps", str(STEPS // 2)]
    if tiny_run.finish(tiny_run.run([*arguments, "--training.output_dir", str(whole)], log)):
        return {"outcome": "not run", "reason": _last_line(log)}
    shutil.copytree(whole / f"checkpoint-{STEPS // 2}", half / f"checkpoint-{STEPS // 2}")
    if (whole / "features").exists():
        shutil.copytree(whole / "features", half / "features")
    resume = ["--training.output_dir", str(half), "--training.resume_from_checkpoint", "latest"]
    if tiny_run.finish(tiny_run.run([*arguments, *resume], log)):
        return {"outcome": "refused", "reason": _last_line(log)}
    before, after = (tiny_run.weights(run / f"checkpoint-{STEPS}") for run in (whole, half))
    different = [name for name in before | after if before.get(name) != after.get(name)]
    return {"outcome": "different" if different else "bit-equal", "different": different}


def _last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["no message"])[-1][-300:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of sets of options; no file is written then")
    chosen = parser.parse_args().only
    rows = []
    with tempfile.TemporaryDirectory() as place:
        arguments = tiny_run.prepare(Path(place))
        for number, (name, options) in enumerate(OPTIONS.items()):
            if chosen and name not in chosen:
                continue
            folder = Path(place) / str(number)
            folder.mkdir()
            row = {"name": name, "options": " ".join(options), **compare([*arguments, *options], folder)}
            rows.append(row)
            print(f"{name}: {row['outcome']} {row.get('reason', '')}", flush=True)
            shutil.rmtree(folder)
    if not chosen:
        result = {"steps": STEPS, "rows": rows, "provenance": storage.provenance(torch.device("cpu"))}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
