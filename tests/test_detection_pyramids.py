"""Feature pyramids for detection against torchvision and plain code."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from zoo.heads.feature_pyramid import FeaturePyramid, RescaledFeaturePyramid
from zoo.heads.simple_pyramid import SimplePyramid


def test_simple_pyramid_agrees_with_plain_code():
    pyramid = SimplePyramid(24, 16, 10)
    x = torch.randn(2, 24, 4, 6)
    weights = pyramid.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        normed = F.layer_norm(x.movedim(1, -1), x.shape[1:2], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)
        return normed.movedim(-1, 1)

    def double(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)

    def project(x: Tensor, level: int, start: int) -> Tensor:
        x = norm(F.conv2d(x, weights[f"levels.{level}.{start}.weight"]), f"levels.{level}.{start + 1}")
        return norm(
            F.conv2d(x, weights[f"levels.{level}.{start + 2}.weight"], padding=1), f"levels.{level}.{start + 3}"
        )

    half = double(x, "levels.0.0")
    expected = {
        "0": project(double(F.gelu(norm(half, "levels.0.1")), "levels.0.3"), 0, 4),
        "1": project(double(x, "levels.1.0"), 1, 1),
        "2": project(x, 2, 0),
        "3": project(F.max_pool2d(x, 2), 3, 1),
    }
    expected["pool"] = expected["3"][:, :, ::2, ::2]
    assert half.shape[1] == 12 and weights["levels.0.3.weight"].shape[:2] == (12, 6)
    given = pyramid([torch.randn(2, 24, 4, 6), x])  # the last map counts
    assert list(given) == list(expected) and pyramid.strides == [4, 8, 16, 32, 64]
    torch.testing.assert_close(dict(given), expected)


@pytest.mark.parametrize("stride, strides", [(4, (4, 8, 16, 32)), (8, (4, 8, 16)), (32, (4, 8, 16, 32, 64))])
def test_simple_pyramid_from_other_strides(stride, strides):
    pyramid = SimplePyramid(8, stride, 6, strides, extra_levels="p6p7")
    levels = pyramid([torch.randn(1, 8, 256 // stride, 512 // stride)])
    assert pyramid.strides == [*strides, 2 * strides[-1], 4 * strides[-1]]
    assert [tuple(level.shape) for level in levels.values()] == [(1, 6, 256 // s, 512 // s) for s in pyramid.strides]


@pytest.mark.parametrize("extra_levels, from_map", [("pool", False), ("p6p7", False), ("p6p7", True), ("none", False)])
def test_feature_pyramid_is_torchvisions(extra_levels, from_map):
    channels = (4, 6, 8)
    pyramid = FeaturePyramid(channels, (8, 16, 32), 6, extra_levels, p6_from_map=from_map)
    extra = dict(pool=LastLevelMaxPool(), p6p7=LastLevelP6P7(8 if from_map else 6, 6), none=None)[extra_levels]
    reference = FeaturePyramidNetwork(list(channels), 6, extra)
    reference.load_state_dict(pyramid.state_dict())
    maps = [torch.randn(2, c, 12 // 2**i, 20 // 2**i) for i, c in enumerate(channels)]
    expected = reference({str(i): feature for i, feature in enumerate(maps)})
    torch.testing.assert_close(pyramid(maps), expected)
    assert len(pyramid.strides) == len(expected) and pyramid.num_maps == 3


def test_p6_reads_the_map_asked_for_where_channels_are_equal():
    pyramid = FeaturePyramid((6, 6), (16, 32), 6, "p6p7", p6_from_map=True)
    maps = [torch.randn(1, 6, 8, 8), torch.randn(1, 6, 4, 4)]
    torch.testing.assert_close(pyramid(maps)["p6"], pyramid.extra_blocks.p6(maps[-1]))


def test_rescaled_feature_pyramid():
    pyramid = RescaledFeaturePyramid(12, 16, 8)
    levels = pyramid([torch.randn(2, 12, 4, 6)])
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert pyramid.strides == [4, 8, 16, 32, 64] and pyramid.num_maps == 4


@pytest.mark.parametrize(
    "create, problem",
    [
        (lambda: FeaturePyramid((8, 8), (16, 16)), r"needs maps of rising strides, got \[16, 16\].*SimplePyramid"),
        (lambda: FeaturePyramid((8,), (16, 32)), r"channels \[8\] and strides \[16, 32\] do not belong together"),
        (lambda: FeaturePyramid((8,), (16,), extra_levels="p6"), r"extra_levels='p6' is not known; use one of none"),
        (lambda: FeaturePyramid((8, 8), (8, 16))([torch.zeros(1, 8, 4, 4)]), r"expected 2 feature maps, got 1"),
        (lambda: SimplePyramid(8, 14), r"cannot bring stride 14 to stride 4"),
        (lambda: SimplePyramid(8, 16, out_strides=(8, 4)), r"out_strides=\(8, 4\) do not rise"),
        (lambda: RescaledFeaturePyramid(8, 16, out_strides=(2, 4)), r"cannot bring stride 16 to stride 2"),
    ],
)
def test_wrong_arguments(create, problem):
    with pytest.raises(ValueError, match=problem):
        create()
