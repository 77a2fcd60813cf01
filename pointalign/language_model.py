"""Where a language model's files are: a folder, the embedded one, or the cache that transformers downloads into."""

import json
import re
from pathlib import Path

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Beside what transformers reads, some repositories hold the weights again in their own format.
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
OTHER_FORMATS = ("original/*", "consolidated*", "onnx/*", "metal/*")


def find_folder(name: str) -> Path:
    """The folder of a language model: `smollm2`, a folder, or a name `owner/model` of the Hugging Face hub.

    A name is looked up as transformers does: what is in its cache is used, the rest is downloaded; with HF_HUB_OFFLINE
    nothing is.

    Raises: FileNotFoundError: there is none, or it cannot be downloaded; the message says what to do.
    """
    from pointalign import assets

    if name == "smollm2":
        return assets.language_model()
    folder = Path(name)
    if (folder / "config.json").exists():
        return folder
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"model.llm={name!r}: no language model in {folder} (config.json is missing)")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    advice = (
        f"where there is a network, `hf download {name}` puts it there (first `hf auth login`, if the model has terms "
        f"of use); or give the folder of a language model"
    )
    where = f"model.llm={name!r}: neither a folder nor complete in the cache {constants.HF_HUB_CACHE}"
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=list(OTHER_FORMATS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{where}, and it could not be downloaded ({reason}): {advice}") from error
    if missing := _missing(folder):  # without a network the hub's client is content with a part of the files
        raise FileNotFoundError(f"{where}: {missing[0]} is missing: {advice}")
    return folder


def _missing(folder: Path) -> list[str]:
    """Files that a language model needs and the folder does not have."""
    index = folder / "model.safetensors.index.json"
    weights = (
        set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if index.exists()
        else {"model.safetensors"}
    )
    return [file for file in ("config.json", *sorted(weights)) if not (folder / file).exists()]
