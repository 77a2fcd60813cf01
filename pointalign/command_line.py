"""What the commands share: help made from the classes of options, the spelling of names, output in any locale.

Help and errors of spelling import neither torch nor transformers, which take seconds: the dataclasses of options are
read as source text. A name is spelled with underscores; hyphens are read too.
"""

import argparse
import ast
import difflib
import functools
import gc
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# Before torch is imported: threads that spin while they wait make an answer many times slower where another program
# wants the processor too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

PACKAGE = Path(__file__).parent
NAME_COLUMN = 38  # where the texts of a help page begin
WIDEST = 110
STOPPED = 130  # the exit status after Ctrl-C, as shells have it

# -- options as they stand in the source -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option: a field of a dataclass.

    Attributes:
        name: with its section, such as `model.lora_rank`.
        kind: its type, as it is written.
        default: as a recipe would write it; "" for none.
        text: what the docstring says about it.
    """

    name: str
    kind: str
    default: str = ""
    text: str = ""

    @property
    def is_list(self) -> bool:
        return "list[" in self.kind

    @property
    def placeholder(self) -> str:
        """What stands for a value in help."""
        names = {"int": "N", "float": "X", "bool": "true|false"}
        kind = self.kind.removesuffix(" | None")
        return "A [B ...]" if self.is_list else names.get(kind, "VALUE")


@functools.cache
def class_source(path: Path, name: str) -> ast.ClassDef:
    """The definition of a class at the top level of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def field_names(definition: ast.ClassDef) -> list[str]:
    """Names of the fields of a dataclass, those of its bases not included."""
    targets = [node.target for node in definition.body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def options_of(path: Path, name: str, section: str = "") -> list[Option]:
    """The fields of a dataclass that its docstring describes under `Attributes:`, in the order of the class."""
    definition = class_source(path, name)
    texts = attribute_texts(ast.get_docstring(definition) or "")
    prefix = f"{section}." if section else ""
    return [
        Option(prefix + node.target.id, ast.unparse(node.annotation), _default(node.value), texts[node.target.id])
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in texts
    ]


def summary_of(path: Path, name: str) -> str:
    """The first line of a class's docstring, without a mark of its section."""
    first = (ast.get_docstring(class_source(path, name)) or "").partition("\n")[0]
    return re.sub(r" \(`--.*?`\)", "", first)


def attribute_texts(docstring: str) -> dict[str, str]:
    """Texts by name of the section `Attributes:` of a docstring; `a, b: text` gives both the same."""
    texts: dict[str, str] = {}
    section = docstring.partition("Attributes:\n")[2].split("\n\n")[0]
    for entry in re.split(r"\n(?=    \S)", section):
        names, _, text = entry.strip().partition(": ")
        texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return texts


def _default(node: ast.expr | None) -> str:
    if isinstance(node, ast.Call):  # field(default_factory=...)
        factory = next((word.value for word in node.keywords if word.arg == "default_factory"), None)
        node = factory.body if isinstance(factory, ast.Lambda) else None
    if node is None:
        return ""
    return shown_value(ast.literal_eval(node))


def shown_value(value: Any) -> str:
    """A value as it may be typed: `lora modality_projector`, `true`, `0.001`; "" for None and for no items."""
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return " ".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


# -- a command whose options are dataclasses ---------------------------------------------------------------------------


@dataclass
class Command:
    """The command line of a program whose options are dataclasses.

    Attributes:
        name: of the command, such as `train`.
        usage: what follows the name in the first line of help.
        description: lines under it.
        groups: titles and options, in the order of help.
        flags: names that take no value, with their texts.
        unlisted: further names that are accepted.
        closing: lines at the end of help.
    """

    name: str
    usage: str
    description: str
    groups: list[tuple[str, list[Option]]]
    flags: dict[str, str] = field(default_factory=dict)
    unlisted: Collection[str] = ()
    closing: str = ""

    def prepare(self, arguments: Sequence[str]) -> list[str]:
        """The arguments with names as they are defined and values of lists in brackets, for the parser of values.

        Prints help and ends the program for `--help`; ends it with a message for a name that there is not.
        """
        if any(argument in ("-h", "--help") for argument in arguments):
            print(self.help())
            sys.exit(0)
        arguments = [underscored(argument) for argument in arguments]
        options = {option.name: option for _, group in self.groups for option in group}
        known = list(dict.fromkeys([*options, *self.flags, *self.unlisted]))
        for argument in arguments:
            name = argument.partition("=")[0].removeprefix("--").rstrip("+")
            if argument.startswith("--") and not any(name == other or name.startswith(f"{other}.") for other in known):
                self.error(f"no option --{name}{suggestion(name, known)}")
        return bracketed(arguments, {name: option for name, option in options.items() if option.is_list})

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\nsee: pointalign {self.name} --help", file=sys.stderr)
        sys.exit(2)

    def help(self, recipe: dict[str, str] | None = None) -> str:
        """The help page.

        Args:
            recipe: values by name that a recipe sets, shown beside the defaults.
        """
        lines = [f"usage: pointalign {self.name} {self.usage}", "", self.description.strip()]
        for title, options in self.groups:
            lines += ["", title]
            for option in options:
                default = [f"default: {option.default}"] if option.default else []
                value = (recipe or {}).get(option.name)
                notes = "; ".join([*default, *([f"this recipe: {value or 'none'}"] if value is not None else [])])
                text = f"{option.text.rstrip('.')} ({notes})" if notes else option.text
                lines.append(entry(f"--{option.name} {option.placeholder}", text))
        if self.flags:
            lines += ["", "Others", *(entry(f"--{name}", text) for name, text in self.flags.items())]
        return "\n".join([*lines, *(["", self.closing.strip()] if self.closing else [])])


def entry(name: str, text: str) -> str:
    """A line of help, or several: the name and, indented, the text."""
    width = min(WIDEST, max(70, shutil.get_terminal_size((100, 24)).columns))
    wrapped = textwrap.wrap(text, width - NAME_COLUMN, break_on_hyphens=False) or [""]
    first = f"  {name}"
    lines = [first.ljust(NAME_COLUMN) + wrapped.pop(0)] if len(first) + 2 <= NAME_COLUMN else [first]
    return "\n".join([*lines, *(" " * NAME_COLUMN + line for line in wrapped)]).rstrip()


def underscored(argument: str) -> str:
    """`--up-axis=y` -> `--up_axis=y`; a value stays as it is."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean --model.lora_rank?` for the nearest names, or "" where none is near."""
    known = list(known)
    same = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same or difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    if not near:  # without the section
        ends = {other.rpartition(".")[2]: other for other in known}
        near = [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=2, cutoff=0.7)]
    near = near or difflib.get_close_matches(name, known, n=1)  # short names, such as --lmm, differ by a larger share
    return f"; did you mean {' or '.join(f'--{other}' for other in near[:3])}?" if near else ""


def bracketed(arguments: Sequence[str], lists: dict[str, Option]) -> list[str]:
    """`--task a b` -> `--task=["a", "b"]` for the options `lists`; what is in brackets already stays as it is."""
    result: list[str] = []
    place = 0
    while place < len(arguments):
        name, equals, value = arguments[place].partition("=")
        place += 1
        option = lists.get(name.removeprefix("--")) if name.startswith("--") else None
        if option is None:
            result.append(arguments[place - 1])
            continue
        values = [value] if equals else []
        while not equals and place < len(arguments) and not arguments[place].startswith("--"):
            values.append(arguments[place])
            place += 1
        alone = len(values) == 1 and (values[0][:1] in ("[", "{") or values[0] in ("null", "None"))
        if alone or (len(values) == 1 and option.kind.startswith("str")):
            result.append(f"{name}={values[0]}")
        elif values:
            numbers = "int" in option.kind and all(re.fullmatch(r"-?\d+", item) for item in values)
            result.append(f"{name}={json.dumps([int(item) for item in values] if numbers else values)}")
        else:
            result.append(name)
    return result


# -- a command with a few options --------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with names in either spelling, none abbreviated, and the nearest name to a wrong one.

    Args:
        command: the name behind `pointalign`.
        options: those of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, **options: Any):
        width = min(WIDEST, max(70, shutil.get_terminal_size((100, 24)).columns))

        class HelpFormatter(argparse.RawDescriptionHelpFormatter):
            """Keeps the lines of the description as they are; the same columns as `Command`."""

            def __init__(self, prog: str):
                super().__init__(prog, max_help_position=NAME_COLUMN, width=width)

        super().__init__(prog=f"pointalign {command}", allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def parse_args(self, arguments: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments = [underscored(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
        names = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
        for argument in arguments:
            name = argument.partition("=")[0][2:]
            if argument.startswith("--") and name and name not in names:
                self.error(f"no option --{name}{suggestion(name, names)}")
        return super().parse_args(arguments, namespace)


# -- every command -----------------------------------------------------------------------------------------------------


def run(command: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run a command; returns its exit status. What a user can mend is one line on standard error.

    Args:
        stopped: what Ctrl-C prints.
    """
    any_locale()
    frozen = gc.get_freeze_count()
    try:
        return command() or 0
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in the buffer goes nowhere
        return 1
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return STOPPED
    finally:
        if not frozen:  # by a caller that wants it so
            gc.unfreeze()  # see `without_collector`: a program that goes on after the command may lose what it made


@contextmanager
def without_collector() -> Iterator[None]:
    """For imports and the loading of a model: what they make stays, and Python's collector would walk all of it often.

    Behind the block the collector runs again and passes over what was made before, until the end of the command.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:  # by the caller: `run` could not tell both apart
            gc.freeze()
        if enabled:
            gc.enable()


def any_locale() -> None:
    """Print letters that the terminal's encoding lacks as escapes, in place of an error in the middle of a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def program() -> str:
    """What a user types before the name of a command: `pointalign`, or this interpreter if that is not on the path."""
    script, python = shutil.which("pointalign"), Path(sys.executable)
    if script is not None and Path(script).parent == python.parent:
        return "pointalign"
    here = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{shlex.quote(str(here))} -m pointalign"
