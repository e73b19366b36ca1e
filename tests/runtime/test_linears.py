"""Linear layers for the CPU: what they compute, for any shape, in any number of threads."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from block_weights import blocks
from torch import nn

from hf_maskselect.runtime.choose import Timer, fastest, usable
from hf_maskselect.runtime.kernels import INT8_KINDS, KINDS, int8_product, missing, quantized_rows
from hf_maskselect.runtime.linears import Choice, ExactLinear, Int8Linear, Int8Plan, Int8Product, Step
from hf_maskselect.runtime.threads import pieces_of


def make(kind, weight, bias):
    if kind in INT8_KINDS:
        plan = Int8Plan(Choice.always(kind), *quantized_rows(weight), bias, Step(8 / 255, 128), Step(40 / 255, 128))
        return Int8Linear(plan)
    return ExactLinear(Choice.always(kind), weight, bias)


@pytest.fixture(params=KINDS)
def kind(request):
    if reason := missing(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("with_bias", [True, False])
def test_each_kind_computes_the_layer_for_every_shape(kind, with_bias):
    torch.manual_seed(0)
    weight, bias = blocks(24, 40, 0.8), torch.randn(24) if with_bias else None
    linear = make(kind, weight, bias)
    tolerance = 0.01 if kind == "bf16" else 0.03 if kind in INT8_KINDS else 1e-6
    every = torch.randn(3, 40, 4).transpose(1, 2)  # not contiguous
    for rows in (torch.randn(40), torch.randn(2, 0, 40), torch.randn(0, 40), every, torch.randn(700, 40)):
        expected = nn.functional.linear(rows, weight, bias)
        output = linear(rows)
        assert output.shape == expected.shape and output.dtype == torch.float32
        assert (output - expected).norm() <= tolerance * expected.norm()
    with pytest.raises(ValueError, match="float32"):
        linear(torch.randn(2, 40).double())


def test_csr_and_dense_are_exact():
    weight, rows = blocks(24, 40, 0.9), torch.randn(600, 40)
    for kind in ("dense", "csr"):
        torch.testing.assert_close(make(kind, weight, None)(rows), rows @ weight.t(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind8", INT8_KINDS)
def test_int8_sums_never_saturate(kind8):
    """The rounded rows of a matrix keep each product of the kernels exact, also for the worst of inputs."""
    if reason := missing(kind8):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    weight[0] = 1.0  # all weights of one sign and size
    values, scales = quantized_rows(weight)
    product = int8_product(kind8, values, scales, None)
    for numbers in (torch.full((8, 64), 255), torch.randint(0, 256, (8, 64)), 255 * (values[:8] > 0)):
        rows = torch._make_per_tensor_quantized_tensor(numbers.to(torch.uint8), 0.02, 128)
        exact = (numbers.double() - 128) @ values.double().t() * 0.02 * scales.double()
        scale = float(exact.abs().max() / 127)
        expected = (exact / scale).round() + 128
        difference = (product(rows, scale, 128).double() / scale).round() + 128 - expected
        assert difference.abs().max() <= 1  # a tie may round either way


def test_int8_weights_keep_seven_bits():
    values, scales = quantized_rows(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    assert int(values.abs().amax(1).min()) > 63
    values, scales = quantized_rows(torch.zeros(8, 64))
    assert not values.any() and torch.equal(scales, torch.ones(8))  # a bias over a tiny scale would overflow


def test_threads_share_rows_and_agree(kind):
    linear = make(kind, blocks(32, 64, 0.8), torch.randn(32))
    rows = torch.randn(600, 64)
    alone = linear(rows)
    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(lambda _: linear(rows), range(8)):
            assert torch.equal(output, alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.inference_mode():
            torch.testing.assert_close(linear(rows), alone, atol=1e-5, rtol=1e-5)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:  # a thread that the user starts later still gets two
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(threads)


def test_an_error_in_a_thread_reaches_the_caller():
    from hf_maskselect.runtime.threads import share

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            share(lambda piece: 1 / piece, [1, 0, 1])
    finally:
        torch.set_num_threads(threads)


def test_the_choice_is_never_slower_than_the_best_dense_kind():
    weight = blocks(16, 32, 0.9)
    slow, fast = {"onednn": 2.0, "csr": 3.0, "1x4": 5.0}, {"onednn": 9.0, "csr": 4.0, "1x4": 1.0}
    mixed = fastest({10: {"onednn": 2.0, "1x4": 5.0}, 100: {"onednn": 9.0, "1x4": 1.0}}, weight)
    assert mixed == Choice.always("onednn")  # both at once would take more memory than float32
    assert fastest({10: slow, 100: {**fast, "onednn": 3.0, "1x4": 4.0}}, weight) == Choice.always("onednn")
    assert fastest({10: fast, 100: fast}, weight) == Choice.always("1x4")
    both = fastest({10: {"int8": 1.0, "1x4": 2.0}, 100: {"int8": 2.0, "1x4": 1.0}}, weight)
    assert [both.kind(rows) for rows in (1, 10, 11, 100, 1000)] == ["int8", "int8", "1x4", "1x4", "1x4"]


def test_kinds_are_tried_where_they_may_pay():
    assert "csr" not in usable(torch.randn(16, 32), KINDS) and "1x4" not in usable(torch.randn(16, 32), KINDS)
    assert "1x4" not in usable(torch.zeros(16, 30), INT8_KINDS)
    weight = blocks(16, 32, 0.9)
    times = Timer([8]).times(weight, usable(weight, KINDS))
    assert times[8].keys() == set(usable(weight, KINDS)) and min(times[8].values()) > 0


@pytest.mark.parametrize("outputs", [32, 21])
@pytest.mark.parametrize("tokens", [1, 31, 70])
def test_an_activation_that_is_looked_up_equals_one_that_is_computed(outputs, tokens):
    if reason := missing("numba-1x4"):
        pytest.skip(reason)
    torch.manual_seed(0)
    weight, rows = blocks(outputs, 40, 0.5), Step(8 / 255, 128).quantize(torch.randn(tokens, 40))
    values, scales = quantized_rows(weight)
    looked_up, computed = (
        Int8Product(Choice.always(kind), values, scales, torch.randn(outputs).fill_(0.3), Step(20 / 255, 100))
        for kind in ("numba-1x4", "int8")
    )
    step = Step(10 / 255, 7)
    first, second = (each.then(nn.functional.gelu, step)(rows) for each in (looked_up, computed))
    assert (first.q_scale(), first.q_zero_point()) == (second.q_scale(), second.q_zero_point()) == (step.scale, 7)
    difference = (first.int_repr().int() - second.int_repr().int()).abs()
    assert difference.max() <= 2 and (difference > 0).float().mean() < 0.02  # a tie before the function may round up


def test_single_zeros_multiply_exactly_in_tiles_and_chunks():
    if reason := missing("numba"):
        pytest.skip(reason)
    torch.manual_seed(0)
    weight = torch.randn(37, 805) * (torch.rand(37, 805) < 0.1)  # three chunks, of which one is short
    weight[5] = 0
    weight[:, 384:768] = 0
    for tokens in (1, 33, 64, 130, 257):
        rows = torch.randn(tokens, 805)
        expected = (rows.double() @ weight.double().t()).float()
        torch.testing.assert_close(make("numba", weight, None)(rows), expected, atol=1e-5, rtol=1e-5)
    rows[3, 4], rows[9, 2] = float("nan"), float("inf")
    output = make("numba", weight, None)(rows)
    assert output[3, weight[:, 4] != 0].isnan().all() and not output[9, weight[:, 2] != 0].isfinite().any()


def test_a_product_without_numba_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_maskselect.runtime.jit", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    missing.cache_clear()
    try:
        assert re.fullmatch(r"numba cannot be imported \(.*\): pip install 'hf_maskselect\[cpu\]'", missing("numba"))
        assert "numba" not in usable(torch.zeros(16, 32), KINDS)
    finally:
        missing.cache_clear()


def test_a_missing_product_is_a_sentence(monkeypatch):
    def gone(*args):
        raise NotImplementedError("no such operator")

    missing.cache_clear()
    monkeypatch.setattr("hf_maskselect.runtime.kernels.int8_product", gone)
    try:
        assert missing("1x4") == "the 1x4 product does not run on this machine (no such operator)"
        assert usable(blocks(16, 32, 0.9), INT8_KINDS) == []
    finally:
        missing.cache_clear()


def test_pieces_cover_everything_and_are_never_small():
    for count, tokens in ((0, 1), (1, 1000), (3, 100), (256, 1), (511, 1), (513, 1), (4096, 1), (9, 128)):
        pieces = pieces_of(count, tokens)
        assert [i for piece in pieces for i in range(count)[piece]] == list(range(count))
        assert len(pieces) <= 1 or min(len(range(count)[piece]) for piece in pieces[:-1]) * tokens >= 256
