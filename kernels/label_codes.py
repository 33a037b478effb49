"""Labels of 4 bits: integer codes of a key's label channels and one scale for each key and kv head. Plain torch.

A label is a function of its own key alone, and the same bits on every back end: the only rounding is that of the
scale, one product and a rounding to bfloat16; codes are counted by comparisons that are exact in float32 (an odd number
of up to 4 bits times a bfloat16 scale). So a moved or rewritten key has the label that it had when first written.

Source: Yang et al., "Post-Training Sparse Attention with Double Sparsity" (2024), labels of 4 bits. Departure: codes
are symmetric, -7 to 7, so that a score is one product of q with integers and one with the scale.
Legend of shapes in kernels/ops.py; C label channels, B = ceil(C / 2) bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 7
"""Codes are -MOST to MOST, stored as code + 8."""
_SHARE = 1 / MOST


def num_bytes(num_channels: int) -> int:
    """Bytes of one key's codes. Byte b holds channel b in its low half and channel B + b, if there is one, in its high
    half."""
    return -(-num_channels // 2)


def encode(labels_XC: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., B] and scales bfloat16 [...] of labels of any float type.

    scale  max|x| / 7
    code   the nearest multiple of the scale, of two as near the one closer to 0; at most 7 away from 0
    """
    x_XC = labels_XC.float()
    scales_X = (x_XC.abs().amax(-1) * _SHARE).bfloat16()
    halves = torch.arange(MOST, device=x_XC.device) + 0.5
    above = x_XC.abs().unsqueeze(-1) > halves * scales_X.float()[..., None, None]
    stored = (above.sum(-1) * x_XC.sign().nan_to_num().int() + 8).to(torch.uint8)
    low, high = F.pad(stored, (0, stored.shape[-1] % 2), value=8).chunk(2, dim=-1)
    return low | high << 4, scales_X


def decode(codes_XB: Tensor, num_channels: int) -> Tensor:
    """Codes as float32 [..., C], without their scales."""
    stored = torch.cat((codes_XB & 15, codes_XB >> 4), dim=-1)[..., :num_channels]
    return stored.float() - 8
