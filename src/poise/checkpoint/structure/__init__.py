"""What the tensors of a model are, read off names, shapes and `config.json`, with no list of architectures.

    found = describe(open_checkpoint(path))
    found["model.layers.3.self_attn.qkv_proj.weight"]   # role, layer, orientation, which rows are queries, keys and values

`words` is what names say, `heads` what is said of attention, `layers` which number is the layer's, `roles` what a tensor is,
`orientation` which dimension is the outputs', `fused` which outputs are whose, `ties` what is stored once for two.
"""

from __future__ import annotations

from .describing import Described, Structure, describe
from .fused import Part
from .layers import Where, layers
from .roles import ROLES
from .ties import Tied

__all__ = ["ROLES", "Described", "Part", "Structure", "Tied", "Where", "describe", "layers"]
