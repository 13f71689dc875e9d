"""How numbers are kept: state formats of few bits, and rounding that loses nothing on average.

from poise.memory import CODECS, get
codec = get("int8")                 # what `state="int8"` of an optimizer means
"""

from poise.memory.bfloat16 import BFloat16
from poise.memory.codec import CODECS, Codec, Kind, Part, get
from poise.memory.dynamic import Dynamic4, Dynamic8
from poise.memory.linear import Linear8
from poise.memory.matrix import Factored4, MatrixCodec, Rank1
from poise.memory.tapered import Tapered

__all__ = [
    "CODECS", "BFloat16", "Codec", "Dynamic4", "Dynamic8", "Factored4", "Kind", "Linear8", "MatrixCodec", "Part", "Rank1",
    "Tapered", "get",
]  # fmt: skip
