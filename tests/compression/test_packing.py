"""E1 and E2 of the export tests: the dense layout, against bits placed one by one, golden words and the library's own function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raysys.compression.packing import WIDTHS, pack, packed_words, unpack


def codes_of(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)


def placed(codes: Tensor, bits: int) -> Tensor:
    """The definition, as Python integers."""
    rows = []
    for row in codes.tolist():
        stream = sum((code + 2 ** (bits - 1)) << (bits * column) for column, code in enumerate(row))
        rows.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(packed_words(len(row), bits))])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 8, 31, 32, 45, 96])
def test_e1_every_bit_lies_where_the_layout_says_and_comes_back(bits: int, columns: int) -> None:
    codes = codes_of(5, columns, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32 and torch.equal(packed, placed(codes, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_e2_golden_words_of_three_bits() -> None:
    packed = pack((torch.arange(32) % 8 - 4).to(torch.int8).reshape(1, 32), 3)
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


@pytest.mark.parametrize("bits", range(2, 9))
def test_e1_equals_the_library_where_its_layout_is_dense(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    if helpers.pack_to_int32(codes_of(1, 32, bits), bits).shape != (1, bits):
        pytest.skip("this compressed-tensors pads words, newer ones do not")
    codes = codes_of(7, 45, bits)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(codes, bits))
    assert torch.equal(helpers.unpack_from_int32(pack(codes, bits), bits, codes.shape), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_that_do_not_fit_are_refused(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for wrong in (low - 1, high + 1):
        codes = torch.zeros(3, 20, dtype=torch.int32)
        if bits == 1:
            codes -= 1
        codes[1, 17] = wrong
        with pytest.raises(ValueError, match=rf"must lie in \[{low}, {high}\]"):
            pack(codes, bits)


def test_other_integers_and_strides_give_the_same_words() -> None:
    codes = codes_of(6, 40, 4)
    assert torch.equal(pack(codes.to(torch.int64), 4), pack(codes, 4))
    assert torch.equal(pack(codes.T.contiguous().T, 4), pack(codes, 4))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        pack(codes_of(2, 8, 4), 9)
    with pytest.raises(ValueError, match="codes must be integers"):
        pack(torch.zeros(2, 8), 4)
    with pytest.raises(ValueError, match=r"packed must be int32 of \[out, 3\] for 32 columns of 3 bits"):
        unpack(torch.zeros(2, 4, dtype=torch.int32), 3, 32)
