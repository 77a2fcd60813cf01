"""`pointalign features RECIPE --data.feature_cache FOLDER`: frozen point features for training, computed once."""

import os
import sys

from pointalign import command_line, training_command


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return command_line.run(lambda: write(arguments), "stopped; the same command goes on where it stopped")


def write(arguments: list[str]) -> None:
    training_command.prepare(arguments, "features")  # help and errors of spelling come before torch is imported
    from pointalign.options import parse

    options = parse(arguments, "features")
    if options.data.feature_cache is None:
        raise ValueError("expected --data.feature_cache FOLDER, the folder to write")
    import torch

    from pointalign import build
    from pointalign.data.dataset import make_datasets
    from pointalign.feature_cache import write_for

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    datasets = make_datasets(options)
    model, processor = build.build_model(options.model, options.data, point_branch_only=True)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # more processes than cards share them: reading clouds takes a process longer than encoding them takes a card
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    count = write_for(options, model, processor, datasets, device, rank, world)
    if rank == 0:
        print(f"{count} entries in {options.data.feature_cache}; now train with the same --data.feature_cache")


if __name__ == "__main__":
    sys.exit(main())
