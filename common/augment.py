"""Augmentation on tensors: geometry that picture and label share, photometry, CutMix masks.

Everything random draws from torch's global generator, which the loader seeds for each picture.
Pictures are float (3, H, W) in [0, 1] before `normalise`; labels are int64 (H, W), 255 void.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses import VOID

# Of ImageNet's pictures, RGB in [0, 1].
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET.values())


def normalise(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] -> zero mean and unit variance over ImageNet."""
    return (images - MEAN.to(images.device)).div_(STD.to(images.device))


def photometry(strength: float = 1.0) -> Callable[[Tensor], Tensor]:
    """The colour jitter, grayscale and blur of a strong view, on pictures (3, H, W) in [0, 1].

    The numbers are those of PS-MT's released code. strength in [0, 1] scales the jitter's ranges
    and the probabilities of grayscale and blur.
    """
    from torchvision.transforms import v2  # here, for it takes a second

    jitter = v2.ColorJitter(*(strength * limit for limit in (0.5, 0.5, 0.5, 0.25)))
    # A kernel of 1, 3 or 5 pixels, of which the first does not blur.
    blurs = [v2.Identity(), v2.GaussianBlur(3, (0.1, 2.0)), v2.GaussianBlur(5, (0.1, 2.0))]
    blur = v2.RandomChoice(blurs, p=[0.404, 0.404, 0.192])
    return v2.Compose(
        [
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(p=0.2 * strength),
            v2.RandomApply([blur], p=0.5 * strength),
        ]
    )


def to_float(image: Tensor) -> Tensor:
    """A picture, uint8 or float in [0, 1], as float32."""
    return image.float().mul_(1 / 255) if image.dtype == torch.uint8 else image.float()


def whole_view(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The whole picture (3, H, W), normalised, and its label (H, W): what evaluation sees."""
    return normalise(to_float(image)), label.long()


def train_view(
    image: Tensor,
    label: Tensor,
    crop: int,
    scales: Sequence[float],
    strong: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Scale, crop, flip and normalise: what networks train on.

    As `random_crop`, the scale one of `scales`, all equally likely. With `strong`, a photometric
    transform, there is a fourth: the same crop, transformed.
    """
    scale = scales[int(torch.randint(len(scales), ()))]
    image, label, valid = random_flip(*random_crop(image, label, crop, scale))
    view = normalise(image), label, valid
    return view if strong is None else (*view, normalise(strong(image)))


def random_flip(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors (..., W) mirrored left to right, or none of them, with probability 1/2."""
    if torch.rand(()) < 0.5:
        return tuple(tensor.flip(-1) for tensor in tensors)
    return tensors


def random_crop(
    image: Tensor, label: Tensor, crop: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A random crop x crop window of both, as seen at `scale` times their size.

    image (3, H, W) uint8 or float in [0, 1], label (H, W) -> image (3, crop, crop) float, label
    (crop, crop) int64 and valid (crop, crop) bool, False on padding. A window of crop / scale
    pixels is cut and then resized, bilinear for the picture and nearest for the label. A smaller
    picture is padded on all sides, with the mean colour and with void.
    """
    height, width = label.shape
    side = max(round(crop / scale), 1)
    box_h, box_w = min(side, height), min(side, width)
    top = int(torch.randint(height - box_h + 1, ()))
    left = int(torch.randint(width - box_w + 1, ()))
    image = image[:, top : top + box_h, left : left + box_w]
    label = label[top : top + box_h, left : left + box_w]

    # A whole window fills the crop; a shorter side keeps the window's scale.
    out_h, out_w = max(crop * box_h // side, 1), max(crop * box_w // side, 1)
    if (out_h, out_w) != (box_h, box_w):
        # Of uint8, in a third of the time; it rounds to 1 / 255, as Pillow and OpenCV do.
        image = F.interpolate(image[None], (out_h, out_w), mode="bilinear", align_corners=False)[0]
        # "nearest-exact" samples at pixel centres, as the bilinear picture does; "nearest" would
        # shift the label by up to half a pixel.
        label = F.interpolate(label[None, None].byte(), (out_h, out_w), mode="nearest-exact")[0, 0]

    above, before = (crop - out_h) // 2, (crop - out_w) // 2
    padding = (before, crop - out_w - before, above, crop - out_h - above)
    image = mean_pad(to_float(image), padding) if any(padding) else to_float(image)
    valid = F.pad(torch.ones(out_h, out_w, dtype=torch.bool), padding)
    return image, F.pad(label.long(), padding, value=VOID), valid


def mean_pad(image: Tensor, padding: Sequence[int]) -> Tensor:
    """A picture (3, H, W) in [0, 1] amid the mean colour; padding is that of F.pad."""
    left, right, above, below = padding
    height, width = image.shape[1:]
    canvas = MEAN.repeat(1, above + height + below, left + width + right)
    canvas[:, above : above + height, left : left + width] = image
    return canvas


def cutmix_masks(
    batch: int,
    height: int,
    width: int,
    boxes: int = 3,
    area: tuple[float, float] = (0.25, 0.5),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """CutMix masks (B, 1, H, W) bool, True where the partner picture shows.

    Each mask has `boxes` rectangles that lie fully inside; where two overlap they cancel. As
    shares of the sides, a rectangle is a^e / sqrt(boxes) high and a^(1-e) / sqrt(boxes) wide, with
    a uniform in `area` and e uniform in [0, 1]: the generator of CutMix-Seg (French et al., BMVC
    2020), which CPS uses. Drawn on the CPU, from `generator` or torch's own, painted on `device`.
    """
    uniform = torch.rand(4, batch, boxes, 1, generator=generator, dtype=torch.float64)
    share = area[0] + (area[1] - area[0]) * uniform[0]
    high = (share ** uniform[1] / boxes**0.5 * height).round()
    wide = (share ** (1 - uniform[1]) / boxes**0.5 * width).round()
    top = ((height - high) * uniform[2]).round()
    left = ((width - wide) * uniform[3]).round()
    corners = torch.stack([top, top + high, left, left + wide])  # (4, B, boxes, 1)
    top, bottom, left, right = corners.to(device, torch.float32, non_blocking=True)
    rows, columns = (torch.arange(size, device=device) for size in (height, width))
    down = ((rows >= top) & (rows < bottom)).float()  # (B, boxes, H)
    across = ((columns >= left) & (columns < right)).float()  # (B, boxes, W)
    return (down.mT @ across)[:, None] % 2 == 1  # the number of boxes over a pixel, odd or even


def mix(tensor: Tensor, masks: Tensor) -> Tensor:
    """CutMix: inside the masks a picture gives way to the one before it in the batch.

    tensor: pictures or logits (B, C, H, W), or maps (B, H, W); masks (B, 1, H, W) bool.
    """
    masks = masks if tensor.ndim == 4 else masks[:, 0]
    return torch.where(masks, tensor.roll(1, 0), tensor)
