"""Mask sets: bits, digest, files and what they do to a model."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import make
from torch import nn

from hf_maskselect import MaskSet, prunable_weights
from hf_maskselect.masking.maskset import pack_bits, unpack_bits

ODD_SHAPES = [(1, 1), (3, 5), (8, 8), (7, 9), (2, 3, 5), (1, 64), (33, 31)]


def random_mask(*shape, seed=0, density=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def example():
    return MaskSet({"b.weight": random_mask(3, 5), "a.weight": random_mask(4, 6, seed=1), "c": random_mask(9, seed=2)})


def as_dict(masks):
    return {name: mask.clone() for name, mask in masks.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# -- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*[(n,) for n in range(1, 71)], *ODD_SHAPES])
@pytest.mark.parametrize("density", [0.0, 0.06, 0.5, 1.0])
def test_bits_are_numpys_and_come_back(shape, density):
    mask = random_mask(*shape, density=density)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(mask.numpy()))
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


VIEWS = [lambda m: m.t(), lambda m: m[:, ::2], lambda m: m[1:], lambda m: m[:, 3:11], lambda m: m.view(-1)[3:67]]


@pytest.mark.parametrize("view", VIEWS)
def test_bits_of_a_view_are_those_of_its_copy(view):
    mask = view(random_mask(24, 16))
    assert torch.equal(pack_bits(mask), pack_bits(mask.clone(memory_format=torch.contiguous_format)))


def test_a_set_unpacks_into_the_shapes_of_its_weights():
    masks = example()
    weights = {name: torch.empty(mask.shape) for name, mask in masks.items()}
    assert same(MaskSet.unpack(masks.pack(), {name: w.shape for name, w in weights.items()}), masks)


# -- digest -----------------------------------------------------------------------------------------------------------


def test_the_digest_knows_every_bit_name_and_shape_but_no_order():
    masks = example()
    assert MaskSet(dict(reversed(as_dict(masks).items()))).digest() == masks.digest()
    others = [MaskSet({**masks, "d": random_mask(1)}), MaskSet({n: m for n, m in masks.items() if n != "c"})]
    others.append(MaskSet({("A" if n == "c" else n): m for n, m in masks.items()}))
    others.append(MaskSet({n: m.reshape(6, 4) if n == "a.weight" else m for n, m in masks.items()}))
    others.append(
        MaskSet({n: torch.cat([m, m[:0], torch.zeros(1).bool()]) if n == "c" else m for n, m in masks.items()})
    )
    for name in masks:
        for i in range(masks[name].numel()):
            changed = as_dict(masks)
            changed[name].view(-1)[i].logical_not_()
            others.append(MaskSet(changed))
    digests = [other.digest() for other in others]
    assert masks.digest() not in digests and len(set(digests)) == len(digests)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_masks_and_metadata(tmp_path):
    masks, path = example(), tmp_path / "masks.safetensors"
    masks.save(path, {"step": "7", "note": "æ"})
    loaded, metadata = MaskSet.load(path)
    assert same(loaded, masks) and loaded.digest() == masks.digest()
    assert metadata["step"] == "7" and metadata["note"] == "æ"
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]  # nothing temporary stays


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    example().save(path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="masks.safetensors"):
            MaskSet.load(path)


def test_a_flipped_bit_never_gives_other_masks(tmp_path):
    """Every bit of the data and one bit of every byte of the header."""
    masks, path = example(), tmp_path / "masks.safetensors"
    masks.save(path)
    content = path.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    for position in range(len(content)):
        for bit in range(8) if position >= data else [position % 7]:
            broken = bytearray(content)
            broken[position] ^= 1 << bit
            path.write_bytes(bytes(broken))
            try:
                loaded, _ = MaskSet.load(path)
            except ValueError:
                continue
            assert same(loaded, masks), (position, bit)  # metadata or padding


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="does not hold masks"):
        MaskSet.load(path)
    save_file({"a": torch.zeros(3)}, path, {"format": "hf_maskselect.masks", "format_version": "999"})
    with pytest.raises(ValueError, match="999"):
        MaskSet.load(path)
    save_file({"a": torch.zeros(3)}, path, {"format": "pt", "format_version": "1"})
    with pytest.raises(ValueError, match="does not hold masks.*'pt'"):
        MaskSet.load(path)
    path.write_text("not safetensors at all")
    with pytest.raises(ValueError, match="cannot be read"):
        MaskSet.load(path)
    with pytest.raises(ValueError, match="absent"):
        MaskSet.load(tmp_path / "absent")


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "masks.safetensors"
    example().save(path)
    with pytest.raises(TypeError):
        MaskSet({"a": random_mask(4)}).save(path, {"step": 7})  # metadata must be text
    assert same(MaskSet.load(path)[0], example())


# -- models -----------------------------------------------------------------------------------------------------------


def test_applying_zeroes_exactly_what_is_masked():
    model = make()
    weights = prunable_weights(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = MaskSet({name: random_mask(*w.shape, seed=i) for i, (name, w) in enumerate(weights.items())})
    masks.apply_(model)
    for name, parameter in model.named_parameters():
        expected = before[name].masked_fill(~masks[name], 0) if name in masks else before[name]
        assert torch.equal(parameter, expected), name
    assert same(MaskSet.from_zeros(model), masks)
    assert set(MaskSet.from_zeros(model, ["query"])) == {name for name in weights if name.endswith("query.weight")}
    assert set(MaskSet.from_zeros(model, None, ["query"])) == {n for n in weights if not n.endswith("query.weight")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_applying_keeps_the_dtype_and_works_on_a_dict(dtype):
    weight = torch.randn(4, 6).to(dtype)
    mask = random_mask(4, 6)
    masked = weight.clone()
    MaskSet({"w": mask}).apply_({"w": masked})
    assert masked.dtype == dtype and torch.equal(masked, weight.masked_fill(~mask, 0))


def test_counts_and_densities():
    masks = MaskSet({"a": torch.tensor([[True, False], [False, False]]), "b": torch.tensor([True, True])})
    assert (masks.total, masks.kept, masks.density(), masks.sparsity()) == (6, 3, 0.5, 0.5)
    assert MaskSet.ones({"a": torch.zeros(2, 3)}).density() == 1
    assert not make().bert.pooler.dense.weight.eq(0).any() and MaskSet.from_zeros(make()).sparsity() == 0


def test_overlap_is_the_share_of_kept_weights_in_common():
    first = MaskSet({"a": torch.tensor([True, True, True, False]), "b": torch.tensor([True])})
    second = MaskSet({"a": torch.tensor([True, False, False, True]), "b": torch.tensor([False])})
    assert first.overlap(first) == 1 and first.overlap(second) == 1 / 4 and second.overlap(first) == 1 / 2
    nothing = MaskSet({"a": torch.zeros(4).bool(), "b": torch.zeros(1).bool()})
    assert nothing.overlap(first) == first.overlap(nothing) == 0


def test_masks_of_another_model_are_refused_with_the_first_difference():
    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    masks = MaskSet.ones(weights)
    masks.check_fits(weights)
    with pytest.raises(ValueError, match="c is prunable in the model but not the masks.*2 masks, 3 prunable"):
        masks.check_fits({**weights, "c": torch.zeros(1)})
    with pytest.raises(ValueError, match="b is prunable in the masks but not the model"):
        masks.check_fits({"a": weights["a"]})
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\) but its mask has \(2, 3\)"):
        masks.check_fits({**weights, "a": torch.zeros(3, 2)})


def test_only_boolean_masks_are_masks():
    with pytest.raises(ValueError, match="mask of a must be boolean.*float32"):
        MaskSet({"a": torch.ones(3)})
    with pytest.raises(ValueError, match="no weight to prune"):
        MaskSet.from_zeros(nn.Linear(2, 2))
