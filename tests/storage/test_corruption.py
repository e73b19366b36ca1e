"""A thousand damaged files: each is refused with our sentence, or gives the identical model; never another one."""

import random
import resource
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_files import READ, equal, folders  # noqa: F401 (a fixture)

# -- what happens to files --------------------------------------------------------------------------------------------


def truncate(draw, content):
    return content[: draw.randrange(len(content))]


def flip(draw, content):
    """One to three bits, half of the time in the first part, where headers are."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        damaged[draw.randrange(len(content) if draw.random() < 0.5 else min(len(content), 400))] ^= (
            1 << draw.randrange(8)
        )
    return bytes(damaged)


def overwrite(draw, content):
    at = draw.randrange(len(content))
    noise = draw.randbytes(draw.randint(1, 64))
    return content[:at] + noise + content[at + len(noise) :]


def remove(draw, content):
    at = draw.randrange(len(content))
    return content[:at] + content[at + draw.randint(1, 16) :]


def extend(draw, content):
    return content + draw.randbytes(draw.randint(1, 64))


def digits(draw, content):
    """Another number somewhere in a header: sizes, shapes, offsets, steps."""
    places = [i for i, byte in enumerate(content[:20_000]) if 48 <= byte <= 57]
    damaged = bytearray(content)
    for at in draw.sample(places, min(len(places), draw.randint(1, 2))):
        damaged[at] = draw.choice(b"0123456789")
    return bytes(damaged)


def hostile_length(draw, content):
    """A header that claims to be enormous, or is not there."""
    size = draw.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(content), len(content) * 2])
    return struct.pack("<Q", size) + content[8:]


def foreign(draw, content):
    return draw.choice(
        [b"", b"{}", b"[]", b"null", b"\x80\x04K\x01.", b"PK\x03\x04", draw.randbytes(100), b'{"a": 1}']
    )


ANY = [truncate, flip, flip, overwrite, remove, extend, digits, digits, foreign]


def rewritten(draw, path):
    """A valid safetensors file with the same header and other tensors: swapped, of another dtype or shape, or gone."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    first, second = draw.sample(sorted(tensors), 2)
    kind = draw.choice(["swap", "dtype", "shape", "drop", "add", "value"])
    if kind == "swap":
        tensors[first], tensors[second] = tensors[second], tensors[first]
    elif kind == "dtype":
        tensors[first] = tensors[first].to(draw.choice([torch.float16, torch.int32, torch.float64, torch.bool]))
    elif kind == "shape":
        tensors[first] = tensors[first].reshape(1, *tensors[first].shape)
    elif kind == "drop":
        del tensors[first]
    elif kind == "add":
        tensors[f"{first}.more"] = tensors[first].clone()
    else:
        flat = tensors[first].clone().view(-1)
        if flat.numel():
            flat[draw.randrange(flat.numel())] += 1
        tensors[first] = flat.view(tensors[first].shape)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, header)


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_damaged_files_never_give_another_model(folders, tmp_path, name):  # noqa: F811
    kind, read, count = READ[name]
    folder = shutil.copytree(folders / kind, tmp_path / "copy")
    path, content = folder / name, (folder / name).read_bytes()
    expected, draw = read(folder), random.Random(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for index in range(count):
        path.write_bytes(content)
        if path.suffix == ".safetensors" and index % 4 == 0:
            rewritten(draw, path)
        elif path.suffix == ".safetensors" and index % 16 == 1:
            path.write_bytes(hostile_length(draw, content))
        else:
            path.write_bytes(draw.choice(ANY)(draw, content))
        try:
            found = read(folder)
        except ValueError as error:
            assert str(folder) in str(error), (index, error)
            refused += 1
        else:
            assert equal(found, expected), index
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} KiB more memory at most"
    assert refused > count // 2


def test_a_thousand_files_are_damaged():
    assert sum(count for _, _, count in READ.values()) >= 1000
