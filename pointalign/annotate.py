"""`pointalign annotate FOLDER`: the annotation file of your own clouds, from their file names or from a table.

From file names: red_chair_01.ply becomes "What is this?" - "This is a red chair."
From a table, a CSV file with a header: file, and either name or answer; and question, if it is not "What is this?".
A file may have several rows.

    file;question;answer
    chair.ply;What is it made of?;It is made of oak.
"""

import argparse
import csv
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from pointalign import command_line
from pointalign.command_line import program

QUESTION = "What is this?"
MOST_NAMED = 5  # files named in a message


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.Parser("annotate", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("folder", metavar="FOLDER", help="folder of clouds or meshes, its subfolders included")
    parser.add_argument("--table", metavar="FILE.csv", help="read questions and answers, not file names")
    parser.add_argument("--output", metavar="FILE.json", help="file to write (default: FOLDER/annotations.json)")
    options = parser.parse_args(arguments)
    return command_line.run(lambda: annotate(options))


def annotate(options: argparse.Namespace) -> None:
    """Write the file and print what to do next.

    Raises:
        FileNotFoundError: there is no cloud, or one that the table names is missing.
        ValueError: a file name holds no name, the table has other columns, or the file to write exists.
    """
    folder = Path(options.folder)
    output = Path(options.output) if options.output else folder / "annotations.json"
    if output.exists():
        raise ValueError(f"{output} exists: remove it, or choose another --output")
    table = Path(options.table) if options.table else None
    files = cloud_files(folder, table)
    rows = list(table_rows(table, folder)) if table else [(file, QUESTION, named(file)) for file in files]
    if not table and (unnamed := [file for file, _, answer in rows if not answer]):
        listed = ", ".join(unnamed[:MOST_NAMED])
        raise ValueError(
            f"{len(unnamed)} file names say nothing about the object ({listed}): rename them, such as "
            f"red_chair_01.ply, or give a --table"
        )
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(json.dumps([conversation(*row) for row in rows], indent=1, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(output)
    print(f"{output}: {len(rows)} questions about {len({file for file, _, _ in rows})} objects, such as")
    print(f"  {rows[0][0]}: {rows[0][1]} {rows[0][2]}")
    annotations, clouds = shlex.quote(str(output)), shlex.quote(str(folder))
    print(f"check them: {program()} check {annotations} --clouds {clouds}")
    print(f"train:      {program()} train finetune --data.annotations {annotations} --data.clouds {clouds}")


def cloud_files(folder: Path, table: Path | None) -> list[str]:
    """The clouds and meshes in a folder, as paths inside it; `table` is none of them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the locale cannot read a name.
    """
    from pointalign.data.point_cloud import FORMATS

    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in FORMATS and path.is_file() and not (table and path.samefile(table))
    )
    for file in files:
        if any(0xDC80 <= ord(letter) <= 0xDCFF for letter in file):  # bytes that are no text in this locale
            raise ValueError(f"{file!a}: this locale cannot read the name; run the command with LC_ALL=C.UTF-8")
    if not files:
        raise FileNotFoundError(f"no cloud or mesh in {folder}: expected files of {', '.join(FORMATS)}")
    return files


def named(file: str) -> str:
    """`red_chair_01.ply` -> `This is a red chair.`; "" where the name holds no word."""
    from pointalign.embedded.facts import name_sentence, read_name

    stem = Path(file).stem.removesuffix("_8192")
    words = [re.sub(r"\d+$", "", word) for word in re.split(r"[\s_.-]+", stem)]
    words = [word for word in words if re.search(r"[^\W\d]", word) and not word[0].isdigit()]
    if not words:
        return ""
    name = read_name(" ".join(words))
    return name_sentence(name.phrase, name.plural)


def table_rows(table: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    """(file, question, answer) of every row of a CSV file with a header, between commas, semicolons or tabs."""
    from pointalign.embedded.facts import name_sentence, read_name

    text = table.read_text(encoding="utf-8-sig")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    columns = [(column or "").strip().lower() for column in reader.fieldnames or []]
    if "file" not in columns or not {"answer", "name"} & set(columns):
        raise ValueError(
            f"{table}: expected a first line with the columns file and answer (or name), and question if you like; "
            f"got {', '.join(columns) or 'an empty file'}"
        )
    reader.fieldnames = columns
    for number, row in enumerate(reader, 2):
        file, name, answer = ((row.get(column) or "").strip() for column in ("file", "name", "answer"))
        if not file or not (name or answer):
            raise ValueError(f"{table}, row {number}: expected a file and an answer or a name, got {row}")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{table}, row {number}: there is no file {folder / file}")
        read = read_name(name) if name and not answer else None
        sentence = name_sentence(read.phrase, read.plural) if read else answer
        yield file, (row.get("question") or "").strip() or QUESTION, sentence


def conversation(file: str, question: str, answer: str) -> dict:
    """An entry of the annotation file, in the PointLLM schema; the file's path stands for the object's id."""
    turns = [{"from": "human", "value": f"<point>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"object_id": file, "conversation_type": "single_round", "conversations": turns}


if __name__ == "__main__":
    sys.exit(main())
