"""Short convolutions against torch's own, and over packed documents."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from steepest.models.convolution import ShortConvolution, convolve


@pytest.mark.parametrize(("time", "width"), [(9, 4), (2, 4), (5, 1)])
def test_it_is_a_causal_convolution(time: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, time, 6, generator=generator)
    weight = torch.randn(6, width, generator=generator)
    padded = F.pad(x.mT, (width - 1, 0))
    expected = F.conv1d(padded, weight[:, None], groups=6).mT
    torch.testing.assert_close(convolve(x, weight), expected)


def test_packed_documents_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 10, 6, generator=generator)
    weight = torch.randn(6, 4, generator=generator)
    segments = torch.tensor([[1, 1, 1, 1, 1, 2, 3, 3, 3, 3]])
    alone = [convolve(x[:, segments[0] == number], weight) for number in (1, 2, 3)]
    torch.testing.assert_close(convolve(x, weight, segments), torch.cat(alone, 1))


def test_sums_of_bfloat16_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = ShortConvolution(6, 4)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    x = torch.randn(2, 9, 6, generator=generator).bfloat16()
    expected = F.silu(convolve(x.float(), layer.weight.squeeze(1))).bfloat16()
    assert torch.equal(layer(x), expected)
