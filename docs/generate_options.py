"""Write docs/options.md from the dataclasses of options and the shipped recipes: `python docs/generate_options.py`."""

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from pointalign.command_line import PACKAGE, Option, options_of, shown_value  # noqa: E402

TARGET = Path(__file__).with_name("options.md")
INTRODUCTION = """# Options

<!-- Written by docs/generate_options.py from the sources: do not edit. -->

Every option of the commands that take many. A recipe sets them by section (`model: {lora_rank: 16}`), the command
line by name (`--model.lora_rank 16`). Names may be written with hyphens; lists are written
`--model.train lora modality_projector` or `'[lora,modality_projector]'`. `pointalign COMMAND --help` shows the same in
the terminal, and `pointalign train RECIPE --help` also what the recipe sets. The other commands have few
options: see their `--help`.
"""
GROUPS = (  # title, introduction, file, class, section
    (
        "Model",
        "`pointalign train`, `pointalign features`: what is trained.",
        "model_options.py",
        "ModelOptions",
        "model",
    ),
    (
        "Data",
        "`pointalign train`, `pointalign features`: what it is trained on. Without paths, the embedded objects.",
        "model_options.py",
        "DataOptions",
        "data",
    ),
    (
        "A part of a mixture",
        "Entries of `data.mixture`, in a recipe only.",
        "model_options.py",
        "MixturePart",
        "",
    ),
    ("Alignment loss", "`pointalign train`.", "alignment.py", "AlignmentConfig", "alignment"),
    (
        "Training",
        "`pointalign train`: `transformers.TrainingArguments` with this project's defaults. Its other arguments are "
        "taken too, as `--training.NAME`.",
        "options.py",
        "TrainingOptions",
        "training",
    ),
    ("Evaluation", "`pointalign evaluate`: what is asked.", "evaluation/results.py", "EvaluationOptions", ""),
    (
        "Generation",
        "`pointalign evaluate`: how answers are generated.",
        "evaluation/answering.py",
        "Generation",
        "generation",
    ),
    (
        "Judge",
        "`pointalign evaluate` and `pointalign evaluate judge`: who judges; nobody without `--judge.model`.",
        "evaluation/judge.py",
        "JudgeOptions",
        "judge",
    ),
    ("Probe", "`pointalign probe`.", "evaluation/probe.py", "ProbeOptions", ""),
)
FLAGS = """## Flags of `pointalign train`

| option | meaning |
|---|---|
| `--fused` | fused kernels for the alignment loss, and leaner parts of the training step, where the device runs them |
| `--fused_parts` | of `--fused`, only these parts; all that the device runs by default |
"""
RECIPE_COLUMNS = (  # title, section, name
    ("trains", "model", "train"),
    ("language model in", "model", "quantization"),
    ("steps", "training", "max_steps"),
    ("samples a step", "training", "per_device_train_batch_size"),
    ("rate", "training", "learning_rate"),
    ("weight of alignment", "alignment", "weight"),
)
KINDS = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text"}


def page() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for title, introduction, file, name, section in GROUPS:
        options = options_of(PACKAGE / file, name, section)
        dashes = "" if name == "MixturePart" else "--"
        rows = [
            (f"`{dashes}{option.name}`", kind(option), f"`{option.default}`" if option.default else "", text(option))
            for option in options
        ]
        parts.append(f"## {title}\n\n{introduction}\n\n{table(['option', 'value', 'default', 'meaning'], rows)}")
    parts += [FLAGS, recipes()]
    return "\n".join(parts)


def kind(option: Option) -> str:
    """The type of an option in words; of several types the first stands for the others."""
    names = [KINDS[name] for name in re.findall(r"\b(?:int|float|bool|str)\b", option.kind)]
    name = names[0] if names else "parts, see below"
    return f"{name}, several" if option.is_list and names else name


def text(option: Option) -> str:
    return option.text.replace("docs/data.md", "[data.md](data.md)").replace("|", "\\|")


def recipes() -> str:
    """A table of the shipped recipes: the command that runs each, and its main values."""
    rows = []
    for path in sorted((PACKAGE / "recipes").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        values = [shown_value(content.get(section, {}).get(name)) for _, section, name in RECIPE_COLUMNS]
        rows.append((f"`{path.stem}`", *values))
    header = ["recipe", *(title for title, _, _ in RECIPE_COLUMNS)]
    introduction = "Main values of the files in `pointalign/recipes/`; where a cell is empty the default above stands."
    return f"## Recipes\n\n{introduction}\n\n{table(header, rows)}"


def table(header: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
