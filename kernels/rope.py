"""Rotary position embedding: interleaved pairs on the last dimensions of a head, YaRN frequencies, inverse rotation."""

import math

import torch
from torch import Tensor

from .norm import at_least_fp32


def rope_frequencies(
    dim: int, theta: float, factor: float = 1.0, original: int = 65536, beta_fast: float = 32, beta_slow: float = 1
) -> Tensor:
    """Angular frequency of each rotated pair, radians per token, ``[dim / 2]`` float64.

    With ``factor`` > 1, YaRN: pairs that turn more than ``beta_fast`` times within ``original`` tokens keep their
    frequency, those that turn less than ``beta_slow`` times are slowed by ``factor``, the ones between are blended.
    DeepSeek-V4 applies no attention scaling (mscale) with it. Source: official inference code; recipe 2.1.
    """
    pair = torch.arange(dim // 2, dtype=torch.float64)
    frequency = theta ** (-2 * pair / dim)
    if factor == 1.0:
        return frequency

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(beta_slow)), dim - 1)
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / factor * ramp


def rope_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[..., dim / 2]`` float32 of integer ``positions [...]``.

    The angle is formed in float64: at a million tokens a float32 product is off by a hundredth of a radian.
    """
    angle = positions.to(torch.float64).unsqueeze(-1) * frequencies.to(positions.device)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor], inverse: bool = False) -> Tensor:
    """Rotates the last 2R channels of ``x [B, T, ..., C]``; ``table`` is (cos, sin), each ``[B, T, R]``.

    Channels (2i, 2i+1) of that tail are the complex number that is turned. ``inverse`` turns backwards, as
    DeepSeek-V4 does to the output of attention, whose values carry the rotation of their keys.
    """
    cos, sin = table
    still, turned = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], -1)
    wide = at_least_fp32(turned).contiguous()
    turn = torch.complex(cos, -sin if inverse else sin).to(wide.dtype.to_complex())
    turn = turn.view(*cos.shape[:2], *(1,) * (x.dim() - 3), cos.shape[-1])
    turned = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    return torch.cat((still, turned.to(x.dtype)), -1)
