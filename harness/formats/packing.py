"""Codes of four bits or fewer, packed: two a byte, or eight a 32-bit word.

Byte j of a row holds code[2j] | code[2j + 1] << 4. A word holds eight codes, code 8w + i in bits
4i .. 4i + 3; seen as bytes (little endian) that is the same order. Signed integer codes are stored
in words as q + 8.

Source: the pack-quantized and nvfp4-pack-quantized layouts of compressed-tensors.
"""

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """codes [*lead, n], uint8 or int8, low four bits used -> uint8 [*lead, ceil(n / 2)].

    An odd row ends in a zero nibble.
    """
    codes = torch.nn.functional.pad(codes.view(torch.uint8) & 0xF, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor, n: int, signed: bool = False) -> Tensor:
    """Inverse of pack_nibbles: uint8 [*lead, ceil(n / 2)] -> uint8 [*lead, n].

    signed: the nibbles are two's complement, and come out as int8.
    """
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :n]
    if not signed:
        return codes
    # a shift to the right fills with the sign, so it carries bit 3 into the upper four
    return (codes << 4).view(torch.int8) >> 4


def pack_words(codes: Tensor) -> Tensor:
    """Signed codes [rows, n] in [-8, 7] -> int32 [rows, ceil(n / 8)], stored as q + 8.

    Missing columns are zero bits.
    """
    nibbles = pack_nibbles(codes.to(torch.int8) + 8)
    return torch.nn.functional.pad(nibbles, (0, -nibbles.shape[-1] % 4)).view(torch.int32)


def unpack_words(words: Tensor, n: int) -> Tensor:
    """Inverse of pack_words: int32 [rows, ceil(n / 8)] -> int8 [rows, n]."""
    return unpack_nibbles(words.contiguous().view(torch.uint8), n).to(torch.int8) - 8
