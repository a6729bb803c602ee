"""Codes of four bits or fewer, packed two a byte: code[2j] | code[2j + 1] << 4 is byte j of a row.

Source: the nvfp4-pack-quantized layout of compressed-tensors.
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
