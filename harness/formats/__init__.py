"""Number formats: tensors to codes and scales and back, exact to the last bit.

base        Format, the maps of all         qtensor     codes and scales, as they are stored
settings    what all are set to             observers   minmax and mse, the range of a group
integer     INT-b, integer_settings; int16  packing     two codes a byte, eight a word
floating    fp4, fp8, nvfp4, fouroversix,   cache       keys and values
            if4, mxfp                       scheme      the formats of a model
grids       casts to small floats
"""

from harness.formats.base import Format, straight_through, weight_format
from harness.formats.cache import KVCache
from harness.formats.fouroversix import FourOverSix
from harness.formats.fp4 import FP4
from harness.formats.fp8 import FP8
from harness.formats.grids import E2M1, E2M3, E3M2, E4M3, E5M2, Grid
from harness.formats.if4 import IF4
from harness.formats.int16 import Int16
from harness.formats.integer import Integer
from harness.formats.mxfp import MX
from harness.formats.nvfp4 import NVFP4
from harness.formats.observers import MSE, absmax, error
from harness.formats.packing import pack_nibbles, unpack_nibbles
from harness.formats.qtensor import QTensor, Scales
from harness.formats.scheme import Scheme

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FP4",
    "FP8",
    "IF4",
    "MSE",
    "MX",
    "NVFP4",
    "Format",
    "FourOverSix",
    "Grid",
    "Int16",
    "Integer",
    "KVCache",
    "QTensor",
    "Scales",
    "Scheme",
    "absmax",
    "error",
    "pack_nibbles",
    "straight_through",
    "unpack_nibbles",
    "weight_format",
]
