"""The command line of training: recipes, its help and its names, all without importing torch.

RECIPE is a YAML file or the name of a shipped one. A run leaves its own as `recipe.yaml`, so that
`pointalign train --training.resume_from_checkpoint runs/demo` needs no further options.
"""

import json
import re
import sys
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from pointalign.command_line import (
    PACKAGE,
    Command,
    class_source,
    field_names,
    options_of,
    shown_value,
    suggestion,
    summary_of,
)

RECIPES = PACKAGE / "recipes"
RUN_RECIPE = "recipe.yaml"  # in a run's folder: what the run was started with
RESUME = "training.resume_from_checkpoint"
NEWEST = ("true", "latest", "auto")  # values of `RESUME` that stand for the newest checkpoint of `output_dir`
MAX_RECIPE_BYTES = 1 << 20
MAX_RECIPE_DEPTH = 20
SECTIONS = {
    "model": "ModelOptions",
    "data": "DataOptions",
    "alignment": "AlignmentConfig",
    "training": "TrainingOptions",
}
FLAGS = {
    "fused": "fused kernels where they run; nothing else changes",
    "fused_parts": "of --fused, only these parts; all that the device runs by default",
    "config": "the recipe, if it is not given first",
}
CLOSING = """
Further: every argument of transformers.TrainingArguments as --training.NAME, see
https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments
Lists are written `--model.train lora modality_projector` or `--model.train [lora,modality_projector]`.
"""


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def training_command(name: str = "train") -> Command:
    """The command line of `train`, or of `features`, which takes the same options and shows those that it heeds."""
    groups = []
    for section, class_name in SECTIONS.items():
        path = _file_of(section)
        groups.append(
            (f"{section.capitalize()}: {summary_of(path, class_name)}", options_of(path, class_name, section))
        )
    recipes = "\n".join(textwrap.wrap(", ".join(shipped_recipes()), 100, break_on_hyphens=False))
    usage, closing = "[RECIPE] [--section.name VALUE ...] [--fused]", CLOSING
    description = f"Train with the alignment loss. RECIPE is a YAML file or one of:\n{recipes}\n"
    description += "(default: demo). `pointalign train RECIPE --help` also shows what a recipe sets."
    if name == "features":
        (model, models), (data, datas), (_, alignments), _ = groups
        written = [option for option in datas if option.name == "data.feature_cache"]
        target = [option for option in alignments if option.name == "alignment.target"]
        groups = [("What to write", written + target), (model, models)]
        groups.append((data, [option for option in datas if option not in written]))
        usage = "[RECIPE] --data.feature_cache FOLDER [--section.name VALUE ...]"
        description = (
            "Compute the frozen point branch's features of all clouds, once, for the trainings that name the\n"
        )
        description += "same folder. RECIPE and options are those of the training; its other options are passed over.\n"
        description += "A stopped run goes on where it stopped; under torchrun the processes share the work."
        closing = ""
    known = [f"{section}.{field}" for section in SECTIONS for field in _all_fields(section)]
    return Command(name, usage, description, groups, FLAGS, known, closing)


def _file_of(section: str) -> Path:
    files = {"model": "model_options.py", "data": "model_options.py", "alignment": "alignment.py"}
    return PACKAGE / files.get(section, "options.py")


def _all_fields(section: str) -> list[str]:
    """Every field of a section, those of transformers and those without a text in help included."""
    names = field_names(class_source(_file_of(section), SECTIONS[section]))
    package = find_spec("transformers")
    if section == "training" and package is not None and package.origin is not None:
        source = Path(package.origin).with_name("training_args.py")
        names += field_names(class_source(source, "TrainingArguments"))
    return names


def prepare(arguments: Sequence[str], command: str = "train") -> tuple[Path, list[str]]:
    """The recipe's file, and the other arguments as the parser of values reads them.

    Prints help, or the message for a recipe or a name that there is not, and ends the program.
    """
    arguments = list(arguments)
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    line = training_command(command)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(line.help({} if recipe is None else _recipe_values(recipe_file(recipe, line), line)))
        sys.exit(0)
    arguments = line.prepare(arguments)
    path = resumed_recipe(arguments) if recipe is None else None
    path = path or recipe_file(recipe or "demo", line)
    try:
        check_recipe(path)
    except (ValueError, OSError) as error:
        line.error(str(error))
    return path, arguments


def recipe_file(recipe: str, line: Command) -> Path:
    """The file of a recipe; ends the program with a message where there is none."""
    path = Path(recipe) if Path(recipe).suffix else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        _no_recipe(recipe, line)
    return path


def _no_recipe(recipe: str, line: Command) -> NoReturn:
    near = suggestion(recipe, shipped_recipes()).replace("--", "") or ";"
    line.error(f"no recipe {recipe!r}{near} expected a YAML file or one of {', '.join(shipped_recipes())}")


def resumed_recipe(arguments: Sequence[str]) -> Path | None:
    """The recipe that the run was started with from whose checkpoint the arguments go on; None where there is none."""
    values = _values(arguments, (RESUME, "training.output_dir"))
    requested = values.get(RESUME)
    if requested is None or requested.lower() in ("null", "none", "false"):
        return None
    if requested.lower() in NEWEST:
        folder = Path(values.get("training.output_dir", "runs/demo"))
    else:
        folder = Path(requested)
        folder = folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder
    return folder / RUN_RECIPE if (folder / RUN_RECIPE).is_file() else None


def _values(arguments: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    values = {}
    for place, argument in enumerate(arguments):
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in names:
            values[name] = value if equals else next(iter(arguments[place + 1 :]), "")
    return values


def _recipe_values(path: Path, line: Command) -> dict[str, str]:
    """Values by dotted name, as help shows them."""
    import yaml

    try:
        check_recipe(path)
    except (ValueError, OSError) as error:
        line.error(str(error))
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {
        f"{section}.{name}": shown_value(json.loads(json.dumps(value)))
        for section, values in content.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }


def check_recipe(path: Path) -> None:
    """Refuse a YAML file that is no recipe before it is built up in memory.

    Raises: ValueError: it is too large, not UTF-8, nested too deep, has aliases (a few lines of them stand for
        gigabytes), or its names are no text. YAML of wrong syntax is left to the parser of options.
    """
    import yaml

    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise ValueError(f"{path}: a recipe has at most {MAX_RECIPE_BYTES} bytes")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{path}: write values out, aliases such as *{event.anchor} are not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_RECIPE_DEPTH:
                raise ValueError(f"{path}: nested deeper than {MAX_RECIPE_DEPTH} lists and mappings")
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return
    if not isinstance(content, dict | None):
        raise ValueError(f"{path}: expected sections and names, got a {type(content).__name__}")
    for name in SECTIONS:
        if content and name in content and not isinstance(content[name], dict):
            raise ValueError(f"{path}: expected names and values under {name}, got {content[name]!r:.50}")
    values = [content]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if bad := [name for name in value if not isinstance(name, str)]:
                raise ValueError(f"{path}: expected names of options, got {bad[0]!r}")
            values += value.values()
        elif isinstance(value, list):
            values += value
