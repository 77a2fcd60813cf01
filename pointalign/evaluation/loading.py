"""A model to evaluate, by any of the names a user has for it."""

import hashlib
from pathlib import Path

from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.options import CHECKPOINTS


def load(
    name: str, up_axis: str | None = None, device: str | None = None
) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor, str]:
    """Model in evaluation mode, processor, and a hash of the weights that were read.

    Args:
        name: a folder for `from_pretrained`, a run's folder of `pointalign.train`, a stage file, or the name of a
            shipped checkpoint.
        device: by default CUDA where there is one.

    Raises:
        FileNotFoundError: none of these.
        ValueError: a stage file that does not say what it was trained with, or that does not fit.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = next((one for one in (Path(name), Path(name) / "model") if (one / "config.json").exists()), None)
    if folder is not None:
        model = PointAlignForConditionalGeneration.from_pretrained(folder, dtype="auto")
        processor = PointAlignProcessor.from_pretrained(folder)
        digest = file_hash(*sorted(folder.glob("*.safetensors")))
    else:
        from pointalign import stages

        path = stages.find_stage(name)
        model, processor = stages.build(*stages.trained_options(path))
        stages.merge_adapters(model)
        digest = file_hash(path)
    if up_axis is not None:
        processor.feature_extractor.up_axis = up_axis
    return model.eval().requires_grad_(False).to(device), processor, digest  # type: ignore[arg-type]


def shipped() -> str:
    """The shipped model that is evaluated when none is named."""
    names = sorted(one.stem for one in CHECKPOINTS.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError("no checkpoint is shipped here: name a MODEL (a folder, a run, or a stage file)")
    return names[0]


def file_hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]
