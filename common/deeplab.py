"""DeepLabv3+ (Chen et al., ECCV 2018, arXiv 1802.02611) on torchvision's ResNets.

The output stride is 16. Two cut points serve the papers: `encode` gives the feature that PS-MT
perturbs, `decode` the one that CAC contrasts; `classify` turns it into logits.
"""

import os
from collections.abc import Callable, Sequence
from textwrap import shorten

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoints import read_checkpoint
from common.flags import InputError


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ at output stride 16, for pictures of any height and width from 32 pixels on.

    backbone: resnet18, resnet34, resnet50 or resnet101. weights: None or "none" (random), the name
    of a torchvision weight enum such as "IMAGENET1K_V1", or the path of a torchvision ResNet state
    dict, whose `fc` is ignored; InputError for weights that are missing or do not fit. width:
    channels of ASPP and decoder, 256 in the paper. The dropout rates are there for CAC.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        weights: str | None = None,
        width: int = 256,
        aspp_dropout: float = 0.0,
        decoder_dropout: float = 0.0,
        classifier_dropout: float = 0.0,
    ):
        super().__init__()
        self.arguments = dict(  # what rebuilds this network around its state dict
            num_classes=num_classes,
            backbone=backbone,
            width=width,
            aspp_dropout=aspp_dropout,
            decoder_dropout=decoder_dropout,
            classifier_dropout=classifier_dropout,
        )
        self.backbone = dilated_resnet(backbone, weights)
        low, high = (64, 512) if backbone in ("resnet18", "resnet34") else (256, 2048)
        self.aspp = ASPP(high, width, aspp_dropout)
        self.reduce_low = ConvBNReLU(low, 48, 1)
        self.decoder = nn.Sequential(
            ConvBNReLU(width + 48, width, 3),
            nn.Dropout(decoder_dropout),
            ConvBNReLU(width, width, 3),
        )
        self.classifier_dropout = nn.Dropout(classifier_dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        for part in (self.aspp, self.reduce_low, self.decoder, self.classifier):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def encode(self, images: Tensor) -> Tensor:
        """ASPP beside the reduced low-level feature: (B, 3, H, W) -> (B, width + 48, H/4, W/4).

        Raises ValueError for pictures under 32 pixels.
        """
        if min(images.shape[-2:]) < 32:
            height, width = images.shape[-2:]
            raise ValueError(f"pictures must be at least 32 x 32 pixels, not {height} x {width}")
        net = self.backbone
        stem = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        low = net.layer1(stem)  # (B, 64 or 256, H/4, W/4)
        high = net.layer4(net.layer3(net.layer2(low)))  # (B, 512 or 2048, H/16, W/16)
        high = F.interpolate(
            self.aspp(high), low.shape[-2:], mode="bilinear", align_corners=False
        )  # (B, width, H/4, W/4)
        low = self.reduce_low(low)  # (B, 48, H/4, W/4)
        # A GPU's autocast enlarges in float32; what follows takes bf16 again.
        return torch.cat([high.to(low.dtype), low], dim=1)

    def decode(self, encoded: Tensor) -> Tensor:
        """(B, width + 48, H/4, W/4) -> (B, width, H/4, W/4), the feature before the classifier."""
        return self.decoder(encoded)

    def classify(self, decoded: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, width, H/4, W/4) -> logits (B, K, H/4, W/4), or (B, K, *size) when size is given."""
        logits = self.classifier(self.classifier_dropout(decoded))
        # Half precision would tie neighbouring classes once their logits are interpolated.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if size is None:
            return logits
        return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)

    def forward(self, images: Tensor, perturb: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits (B, K, H, W); `perturb(encoded)`, when given, is added to the encoding (PS-MT)."""
        encoded = self.encode(images)
        if perturb is not None:
            encoded = encoded + perturb(encoded)
        return self.classify(self.decode(encoded), images.shape[-2:])


class ConvBNReLU(nn.Sequential):
    """A convolution that keeps a map's size, but for the stride; BatchNorm; ReLU."""

    def __init__(self, channels: int, width: int, side: int, stride: int = 1, dilation: int = 1):
        padding = (side - 1) // 2 * dilation
        conv = nn.Conv2d(channels, width, side, stride, padding, dilation, bias=False)
        super().__init__(conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, 3x3 at rates 6, 12, 18, and the picture's mean."""

    def __init__(self, channels: int, width: int, dropout: float):
        super().__init__()
        self.branches = nn.ModuleList(
            [ConvBNReLU(channels, width, 1)]
            + [ConvBNReLU(channels, width, 3, dilation=rate) for rate in (6, 12, 18)]
        )
        for conv, _, _ in self.branches[1:]:
            conv.__class__ = DilatedConv  # the same weights, another forward
        self.pooled = ConvBNReLU(channels, width, 1)
        self.project = ConvBNReLU(5 * width, width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, high: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, width, h, w)."""
        pooled = self.pooled(high.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *high.shape[-2:])
        # Laid out as its neighbours are: else the concatenation would be in another layout.
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        features = [branch(high) for branch in self.branches] + [pooled]
        return self.dropout(self.project(torch.cat(features, dim=1)))


class DilatedConv(nn.Conv2d):
    """A 3x3 convolution, stride 1, padding as its dilation, that is quick on small maps too."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        # Of a dilation no smaller than the map, all taps but the centre see padding, zeros.
        if min(self.dilation) >= max(x.shape[-2:]):
            return F.conv2d(x, self.weight[..., 1:2, 1:2], self.bias)
        # On a CPU gradients of channels-last weights are copied, which takes longer than a small
        # map's convolution; contiguous ones are not. common.machine.place leaves them so.
        if x.device.type == "cpu" and x.numel() // x.shape[1] <= 1024:
            out = super().forward(x.contiguous())
            return out.contiguous(memory_format=torch.channels_last)
        return super().forward(x)


class Ensemble(nn.Module):
    """One model out of several networks: the mean of their logits (PS-MT's two teachers)."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> logits (B, K, H, W)."""
        return torch.stack([network(images) for network in self.networks]).mean(dim=0)


class Together(nn.Module):
    """Several models in one pass, each network of which runs once, whichever models it is in."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> logits (M, B, K, H, W), of an Ensemble the mean."""
        members = [m.networks if isinstance(m, Ensemble) else [m] for m in self.models]
        networks = dict.fromkeys(network for group in members for network in group)  # each once
        logits = {network: network(images) for network in networks}
        means = [torch.stack([logits[n] for n in group]).mean(dim=0) for group in members]
        return torch.stack(means)


def dilated_resnet(backbone: str, weights: str | None) -> nn.Module:
    """torchvision's ResNet without `fc`, layer4 at stride 1 with dilations 2, 4, 8 by block.

    torchvision's own `replace_stride_with_dilation` gives 1, 2, 2 and refuses ResNet-18/34.
    """
    from torchvision.models import get_model  # here, for it takes a second

    resnet = get_model(backbone, weights=None)
    resnet.fc = nn.Identity()
    if weights not in (None, "none"):
        load_backbone(resnet, backbone, weights)
    for index, block in enumerate(resnet.layer4):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.__class__ = DilatedConv  # the same weights, another forward
                    module.dilation = module.padding = (2 ** (index + 1),) * 2
    return resnet


def load_backbone(resnet: nn.Module, backbone: str, weights: str) -> None:
    """Fill a torchvision ResNet from an enum name or a file; all of it or an InputError."""
    from torchvision.models import get_model_weights

    enum, weights = get_model_weights(backbone), os.path.expanduser(weights)
    known = weights in enum.__members__
    try:
        state = enum[weights].get_state_dict(progress=False) if known else read_checkpoint(weights)
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    except Exception as error:  # a dozen kinds
        names = ", ".join(enum.__members__)
        found = "no file" if isinstance(error, FileNotFoundError) else type(error).__name__
        reason = f"neither a PyTorch state dict ({found}) nor one of {names}, none"
        if known:
            reason = (
                f"cannot download {enum[weights].url} ({error}); fetch that file on another "
                "machine and give its path, or use --weights none"
            )
        raise InputError(f"--weights {weights}: {reason}") from error
    try:
        resnet.load_state_dict(state)
    except RuntimeError as error:
        first = shorten(str(error).split("\n\t")[1], 150)
        raise InputError(f"--weights {weights}: does not fit {backbone}: {first}") from error
