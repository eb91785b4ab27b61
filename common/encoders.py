"""IAL's other networks, on small and on pretrained encoders; architectures are ours if unmarked."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.deeplab import conv_bn_relu, dilated_resnet
from common.slic import segment_mean


class TagNet(nn.Module):
    """The tag classifier, a ResNet of stride 16 like IRN's (cited), or a small network.

    images (B, 3, H, W) -> scores (B, K, h, w), whose mean is a picture's score (cited: CAM).
    """

    def __init__(self, num_tags: int, net: str, weights: str):
        super().__init__()
        self.stages, widths = trunk(net, weights, 5, [(16, 2, 1), (32, 2, 1), (64, 1, 1)])
        self.head = nn.Conv2d(widths[-1], num_tags, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(nn.Sequential(*self.stages)(images))


@torch.no_grad()
def activation_maps(net: TagNet, images: Tensor, tags: Tensor, scales: Sequence[float]) -> Tensor:
    """CAM: ReLU of the scores, a sum over scales and flips, over its maximum (cited: PSA).

    images (B, 3, H, W), tags (B, K) -> (B, K, H, W) in [0, 1], 0 for absent classes.
    """
    total = 0.0
    for scale in scales:
        size = [max(round(scale * side), 32) for side in images.shape[2:]]
        scaled = F.interpolate(images, size, mode="bilinear", align_corners=False)
        for view in (scaled, scaled.flip(-1)):
            scores = resized(net(view).relu(), images)
            total = total + (scores if view is scaled else scores.flip(-1))
    total = total * tags[:, :, None, None]
    return total / total.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)


class RegionNet(nn.Module):
    """f^m: features pooled in a superpixel, those outside left out (paper), then classified.

    images (B, 3, H, W), segments (B, h, w) at the cells, ids below count = S -> logits (B, S, C).
    The mean is ours; the paper pools a grid, as Fast R-CNN does. The field of view is narrow, 7
    pixels of `small`, 35 of ResNet-50's first stages: a wide one would repeat what the unary
    network made of the surroundings, this one finds what regions of a class have in common.
    """

    def __init__(self, num_classes: int, net: str, weights: str):
        super().__init__()
        self.stages, widths = trunk(net, weights, 2, [(24, 2, 1), (48, 1, 1)])
        self.head = nn.Sequential(
            nn.Linear(widths[-1], 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, num_classes)
        )

    def forward(self, images: Tensor, segments: Tensor, count: int) -> Tensor:
        features = resized(nn.Sequential(*self.stages)(images), segments)
        return self.head(segment_mean(features, segments, count)[0])


class GuidanceNet(nn.Module):
    """An encoder with skips, after SPN's guidance network, that makes a picture's gates.

    images (B, 3, H, W) -> gates (B, 4, 4, h, w), logits at the cells.
    """

    def __init__(self, net: str, weights: str, stride: int, width: int = 32):
        super().__init__()
        small = [(12, 2, 1), (24, 2, 1), (48, 1, 1), (48, 1, 2), (48, 1, 4)]
        self.stages, widths = trunk(net, weights, 4, small)
        self.stride = stride
        self.skips = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.gates = nn.Conv2d(width, 16, 3, padding=1)
        nn.init.zeros_(self.gates.bias)

    def forward(self, images: Tensor) -> Tensor:
        features, skips = images, []
        for stage, skip in zip(self.stages, self.skips, strict=True):
            features = stage(features)
            skips.append(skip(features))
        merged = skips.pop()
        for skip in reversed(skips):
            merged = resized(merged, skip) + skip
        merged = resized(merged, images[..., :: self.stride, :: self.stride])
        return self.gates(self.smooth(merged)).unflatten(1, (4, 4))


def trunk(
    net: str, weights: str, depth: int, small: Sequence[tuple[int, int, int]]
) -> tuple[nn.ModuleList, list[int]]:
    """An encoder's stages and their output channels.

    net "small": 3x3 convolutions, (width, stride, dilation) each. A ResNet: its first `depth`
    stages, of strides 2, 4, 8, 16, 16; `weights` as in DeepLabV3Plus.
    """
    if net == "small":
        widths = [width for width, _, _ in small]
        stages = [
            conv_bn_relu(channels, width, 3, dilation, stride)
            for channels, (width, stride, dilation) in zip([3, *widths], small, strict=False)
        ]
        return nn.ModuleList(stages), widths
    resnet = dilated_resnet(net, weights)
    first = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu)
    second = nn.Sequential(resnet.maxpool, resnet.layer1)
    stages = [first, second, resnet.layer2, resnet.layer3, resnet.layer4]
    wide = 4 if net in ("resnet50", "resnet101") else 1
    widths = [64, *(wide * width for width in (64, 128, 256, 512))]
    return nn.ModuleList(stages[:depth]), widths[:depth]


def resized(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)
