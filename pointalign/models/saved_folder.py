"""What a saved folder says to a program that has not imported pointalign.

transformers alone takes `model_type: pointalign` for a sign of its own age, and loads a plain tokenizer in the place of
the processor. An `auto_map` makes it stop and name the folder, where `needs_pointalign.py` says what to do; a user who
trusts that file gets the registered classes of the installed package. Where pointalign is imported its classes come
first, and the file is not read.
"""

import json
from pathlib import Path

FILE = "needs_pointalign.py"
SOURCE = '''"""This model needs the package `pointalign`.

    pip install pointalign, or `pip install -e .` in a checkout of it

    import pointalign                      # registers the classes with transformers
    model, processor, _ = pointalign.load("this folder")

With `import pointalign`, AutoConfig, AutoModel, AutoModelForMultimodalLM and AutoProcessor load it too. This file holds
no model: with `trust_remote_code=True` it imports the installed package.
"""

from pointalign.models import (
    PointAlignConfig,
    PointAlignFeatureExtractor,
    PointAlignForConditionalGeneration,
    PointAlignModel,
    PointAlignProcessor,
)

__all__ = [
    "PointAlignConfig",
    "PointAlignFeatureExtractor",
    "PointAlignForConditionalGeneration",
    "PointAlignModel",
    "PointAlignProcessor",
]
'''
MODULE = FILE.removesuffix(".py")
CLASSES = {
    "config.json": {
        "AutoConfig": f"{MODULE}.PointAlignConfig",
        "AutoModel": f"{MODULE}.PointAlignModel",
        "AutoModelForMultimodalLM": f"{MODULE}.PointAlignForConditionalGeneration",
    },
    "processor_config.json": {"AutoProcessor": f"{MODULE}.PointAlignProcessor"},
}


def name_package(folder: str | Path) -> None:
    """Write `needs_pointalign.py`, and the classes that need it into the configurations that the folder has."""
    folder = Path(folder)
    for file, classes in CLASSES.items():
        path = folder / file
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": classes}
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / FILE).write_text(SOURCE, encoding="utf-8")
