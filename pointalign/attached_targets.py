"""What the hidden states of image or point tokens are compared with: features of a multimodal model, one row a token.

Shape legend: R tokens of a batch, D width of the features; N images, n features of each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pointalign.alignment import pool_tokens

# Ends of the names of modules in a multimodal projector whose input has one row a token, and who has them. Where a
# projector groups or pools features, the module behind that step is named: a row stands for a group of patches.
PROJECTOR_INPUTS = {
    "multi_modal_projector.mm_soft_emb_norm": "Gemma 3, after average pooling",
    "multi_modal_projector.layer_norm": "InternVL, after pixel shuffle",
    "multi_modal_projector.linear_1": "LLaVA and its descendants, Mistral 3 after patch merging",
    "connector.modality_projection.proj": "Idefics 3, SmolVLM, after pixel shuffle",
    "visual.merger.linear_fc1": "Qwen3-VL, four patches a row",
    "visual.merger.mlp.0": "Qwen2-VL, Qwen2.5-VL, four patches a row",
    "language_projection": "BLIP-2, the Q-Former's output",
    "modality_projector.0": "PointAlign, the Q-Former's output",
}
VISION_TOWERS = ("vision_tower", "vision_model", "visual.blocks")


class FeatureTap:
    """Collects what goes into a module, or comes out of it, while it is listening.

    Attributes:
        calls: features of each call, `[..., n, D]`, in order.
    """

    def __init__(self, module: nn.Module, of_input: bool):
        self.calls: list[Tensor] = []
        self.listening = False
        if of_input:
            self._hook: RemovableHandle = module.register_forward_pre_hook(self._note_input)
        else:
            self._hook = module.register_forward_hook(self._note_output)

    def _note_input(self, _module: nn.Module, inputs: tuple) -> None:
        if self.listening:
            self.calls.append(inputs[0])

    def _note_output(self, _module: nn.Module, _inputs: tuple, output: Any) -> None:
        if self.listening:
            output = getattr(output, "last_hidden_state", output)
            self.calls.append(output[0] if isinstance(output, tuple) else output)

    def remove(self) -> None:
        self._hook.remove()


class ModelFeatures:
    """Rows `[R, D]` that a tapped module of the model gives in the same forward pass.

    Args:
        tap: on the module.
        width: D.
        grouped: features are pooled to the number of tokens, see `pool_to_tokens`.
    """

    def __init__(self, tap: FeatureTap, width: int, grouped: bool):
        self.tap, self.width, self.grouped = tap, width, grouped

    def begin(self, _inputs: dict[str, Any]) -> None:
        self.tap.calls, self.tap.listening = [], True

    def end(self) -> None:
        self.tap.listening = False

    def rows(self, _inputs: dict[str, Any], _outputs: Any, num_rows: int) -> Tensor:
        """Raises: ValueError: the module did not run, or its features do not correspond to the tokens."""
        calls, self.tap.calls = self.tap.calls, []
        if not calls:
            raise ValueError(
                "the batch has image or point tokens, but the vision part of the model did not run: its inputs "
                "(pixel_values, point_values) are missing, or features were passed in their place"
            )
        features = [call.detach() for call in calls]
        if self.grouped:
            return pool_to_tokens(features, num_rows)
        return torch.cat([call.reshape(-1, call.shape[-1]) for call in features])

    def remove(self) -> None:
        self.tap.remove()


class StoredFeatures:
    """Rows from files `{id}.npy` `[n, D]` in a folder; a batch names its files under `feature_ids`, in token order."""

    def __init__(self, folder: Path):
        first = next(iter(sorted(folder.glob("*.npy"))), None)
        if first is None:
            raise FileNotFoundError(f"{folder} has no features: expected files ID.npy of shape [tokens, width]")
        self.folder, self.width = folder, int(np.load(first, mmap_mode="r").shape[-1])

    def begin(self, inputs: dict[str, Any]) -> None:
        if "feature_ids" not in inputs:
            raise ValueError(f"the targets are files in {self.folder}: the batch needs `feature_ids`, their names")

    def end(self) -> None:
        pass

    def rows(self, inputs: dict[str, Any], _outputs: Any, _num_rows: int) -> Tensor:
        """Raises: FileNotFoundError: an id has no file. ValueError: the batch names no files."""
        arrays = []
        for name in inputs["feature_ids"]:
            path = self.folder / f"{name}.npy"
            if not path.is_file():
                raise FileNotFoundError(f"no features of {name!r}: {path} is missing")
            arrays.append(torch.from_numpy(np.load(path, allow_pickle=False)))
        return torch.cat(arrays).to(inputs["input_ids"].device)

    def remove(self) -> None:
        pass


class ComputedFeatures:
    """Rows `[..., D]` that a function of the inputs and the outputs of the forward pass gives."""

    def __init__(self, function: Any, width: int):
        self.function, self.width = function, width

    def begin(self, inputs: dict[str, Any]) -> None:
        pass

    def end(self) -> None:
        pass

    def rows(self, inputs: dict[str, Any], outputs: Any, _num_rows: int) -> Tensor:
        features = self.function(inputs, outputs)
        return features.detach().reshape(-1, features.shape[-1])

    def remove(self) -> None:
        pass


Target = ModelFeatures | StoredFeatures | ComputedFeatures


def make_target(model: nn.Module, target: Any, target_size: int | None) -> Target:
    """The target of `attach`.

    Raises:
        ValueError: the model has no such module, or the width of the features is not known.
        FileNotFoundError: a folder without features.
    """
    if callable(target):
        if target_size is None:
            raise ValueError("a target that is a function needs target_size, the width of its rows")
        return ComputedFeatures(target, target_size)
    if target == "projector_input":
        module = _find(model, PROJECTOR_INPUTS)
        if module is None:
            listed = ", ".join(f"{name} ({whose})" for name, whose in PROJECTOR_INPUTS.items())
            raise ValueError(
                f"{type(model).__name__} has none of the known projectors ({listed}): give a function as the target"
            )
        return ModelFeatures(FeatureTap(module, of_input=True), _input_width(module), grouped=False)
    if target == "vision":
        return _vision(model)
    if isinstance(target, Path) or Path(str(target)).is_dir():
        return StoredFeatures(Path(target))
    raise ValueError(f"target={target!r}: expected projector_input, vision, a folder of features, or a function")


def _vision(model: nn.Module) -> Target:
    configuration: Any = model.config
    if hasattr(configuration, "point_config"):
        return ComputedFeatures(_encoder_tokens, int(configuration.point_config.hidden_size))
    if hasattr(configuration, "qformer_config"):
        raise ValueError(
            f"target='vision': the tokens of {type(model).__name__} are queries of a Q-Former, which stand for no "
            "patches; take target='projector_input', the Q-Former's output"
        )
    tower = _find(model, VISION_TOWERS)
    if tower is None:
        raise ValueError(f"{type(model).__name__} has no vision tower of {', '.join(VISION_TOWERS)}: give a function")
    module = list(tower)[-1] if isinstance(tower, nn.ModuleList) else tower  # Qwen: patches before they are merged
    return ModelFeatures(FeatureTap(module, of_input=False), int(configuration.vision_config.hidden_size), grouped=True)


def _encoder_tokens(_inputs: dict[str, Any], outputs: Any) -> Tensor:
    """Point encoder tokens of our own model, pooled as for the alignment target `encoder`."""
    features = outputs.point_features
    if features is None or features.encoder is None:
        raise ValueError("target='vision' needs the clouds themselves (point_values), not cached features")
    return pool_tokens(features.encoder, features.qformer.shape[1])


def _find(model: nn.Module, names: Sequence[str] | dict[str, str]) -> nn.Module | None:
    """The first module whose dotted name ends in one of `names`; adapters around modules are passed over."""
    modules = dict(model.named_modules())
    for ending in names:
        for name, module in modules.items():
            if f".{name}".endswith(f".{ending}"):
                return module
    return None


def _input_width(module: nn.Module) -> int:
    width = getattr(module, "in_features", None)  # of linear layers, 4-bit and adapted ones included
    return int(module.weight.shape[-1] if width is None else width)  # of norms their weight's


def pool_to_tokens(features: Sequence[Tensor], num_rows: int) -> Tensor:
    """Features of a vision tower `[N, n, D]`, or of all images in one row `[S, D]`, averaged to rows `[R, D]`.

    - As many features as tokens: as they are; with one more an image, a class token at the front, without it.
    - `[N, n, D]`, n a square grid and the tokens of an image a coarser one that divides it: averages of its cells.
    - `[S, D]` with S a multiple of R (Qwen, whose patches lie in merge order): averages of consecutive patches.

    Raises: ValueError: none of these fits, so no feature corresponds to a token.
    """
    joined = torch.cat(list(features))
    if joined.dim() == 2:
        group, rest = divmod(len(joined), num_rows)
        if not rest:
            return joined.unflatten(0, (num_rows, group)).mean(dim=1)
        raise _no_correspondence(joined, num_rows)
    images, count, width = joined.shape
    tokens, rest = divmod(num_rows, images)
    if rest or not tokens:
        raise _no_correspondence(joined, num_rows)
    for skipped in (0, 1):  # a class token
        patches = joined[:, skipped:]
        if patches.shape[1] == tokens:
            return patches.reshape(-1, width)
        side, coarse = round((count - skipped) ** 0.5), round(tokens**0.5)
        if side**2 == count - skipped and coarse**2 == tokens and coarse and side % coarse == 0:
            step = side // coarse
            cells = patches.reshape(images, coarse, step, coarse, step, width)
            return cells.mean(dim=(2, 4)).reshape(-1, width)
    raise _no_correspondence(joined, num_rows)


def _no_correspondence(features: Tensor, num_rows: int) -> ValueError:
    return ValueError(
        f"vision features of shape {list(features.shape)} do not correspond to {num_rows} tokens, neither one by one "
        f"nor as a grid: take target='projector_input', or a function that gives a row for each token"
    )
