"""2:4 packing: torch's own conversion is the oracle, bit for bit; round trips and refusals."""

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from hf_maskselect.masking.patterns import NM
from hf_maskselect.storage.two_of_four import check_groups, compress, decompress, layout_of

SHAPES = {torch.float16: (32, 32), torch.bfloat16: (32, 32), torch.int8: (16, 64)}


def two_of_four(dtype, rows, columns, seed=0, holes=0.0):
    """A random 2:4 matrix; `holes`: share of the kept weights that are zero too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (rows, columns), generator=generator).to(dtype)
    else:
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
    mask = NM(2, 4).masks({"w": torch.rand(rows, columns, generator=generator)}, 0.5)["w"]
    mask &= torch.rand(rows, columns, generator=generator) >= holes
    return weight * mask


@pytest.mark.parametrize("dtype", SHAPES)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("holes", [0.0, 0.3, 1.0])
def test_the_layout_is_that_of_torch(dtype, seed, holes):
    rows, columns = (size * (1 + (seed + i) % 4) for i, size in enumerate(SHAPES[dtype]))
    weight = two_of_four(dtype, rows, columns, seed, holes)
    values, meta = compress("w", weight)
    expected_values, expected_meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values, expected_values)
    assert meta.dtype == expected_meta.dtype and torch.equal(meta, expected_meta)
    assert layout_of(dtype, (rows, columns)) == tuple(meta.shape)
    assert torch.equal(decompress(values, meta), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_bit_pattern_comes_back(dtype):
    """Subnormal numbers, infinities and NaN are moved as bits."""
    bits = torch.arange(1, 2**15, dtype=torch.int16)
    bits = torch.cat([bits, bits - 2**15, bits.new_tensor([1, 1])]).view(1024, 64)
    pairs = bits.view(-1, 2)
    weight = torch.zeros(len(pairs), 4, dtype=torch.int16)
    places = torch.combinations(torch.arange(4))[torch.arange(len(pairs)) % 6]
    weight.scatter_(1, places, pairs)
    weight = weight.view(1024, 128)
    found = decompress(*compress("w", weight.view(dtype)))
    assert torch.equal(found.view(torch.int16), weight)


def test_torchs_tensor_takes_it():
    weight = two_of_four(torch.bfloat16, 64, 128)
    sparse = SparseSemiStructuredTensorCUTLASS(weight.shape, *compress("w", weight), None, None, None)
    assert torch.equal(sparse.to_dense(), weight)


def test_a_single_bad_group_is_named():
    weight = two_of_four(torch.float16, 64, 64)
    weight[37, 20:24] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    for look in (lambda: compress("layer.weight", weight), lambda: check_groups("layer.weight", weight)):
        with pytest.raises(
            ValueError, match="layer.weight does not hold the pattern 2:4: 1 of its 1024 .*5 of row 37"
        ):
            look()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(32, 32), "has dtype torch.float32, which cannot be packed for sparse tensor cores"),
        (torch.zeros(32, 770, dtype=torch.float16), r"shape \(32, 770\)"),
        (torch.zeros(33, 64, dtype=torch.float16), "rows must be a multiple of 32 and columns of 32"),
        (torch.zeros(16, 32, dtype=torch.int8), "rows must be a multiple of 16 and columns of 64"),
        (torch.zeros(64, 32, dtype=torch.bfloat16).t(), "not contiguous"),
        (torch.zeros(2, 32, 32, dtype=torch.bfloat16), "shape"),
    ],
)
def test_what_does_not_fit_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        compress("w", weight)


def test_columns_that_make_no_groups_are_named():
    with pytest.raises(ValueError, match="w has 770 columns, not a multiple of 4"):
        check_groups("w", torch.zeros(8, 770))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8)])
def test_groups_of_any_pattern_are_checked(n, m):
    weight = torch.rand(12, 6 * m) * NM(n, m).masks({"w": torch.rand(12, 6 * m)}, 1 - n / m)["w"]
    check_groups("w", weight, n, m)
    with pytest.raises(ValueError, match=f"pattern {n}:{m}"):
        check_groups("w", weight + 1, n, m)


def test_the_channels_of_a_convolution_are_its_groups():
    weight = torch.rand(4, 8, 3, 3)
    check_groups("w", weight * NM(2, 4).masks({"w": weight}, 0.5)["w"])
    with pytest.raises(ValueError, match="does not hold"):
        check_groups("w", weight)


def test_damaged_metadata_is_refused():
    values, meta = compress("w", two_of_four(torch.float16, 32, 32))
    for bad in (meta[:16], meta.int(), torch.zeros_like(meta)):
        with pytest.raises(ValueError, match="metadata"):
            decompress(values, bad)
