"""A start of our own where ImageNet's weights cannot be had: a ResNet that learns image-level tags.

    python tests/pretrain.py DATA start.pt        # then: python cps.py --weights start.pt ...

DATA is a folder as `--dataset folder` reads it; of its masks only the classes that they hold are
used, or a tags.txt instead. Writes a torchvision state dict. Run by hand.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.augment import normalise
from common.layouts import Pair, read_image, read_mask
from common.machine import has_bf16, keep_memory, place
from common.optim import sgd_poly
from common.tags import load_tagged


def read(pairs: list[Pair]) -> list[Tensor]:
    """The pictures, (3, H, W) uint8 each: the set has to fit into memory."""
    return [torch.from_numpy(read_image(image)).permute(2, 0, 1) for image, _ in pairs]


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """By class: the mean of the precisions at the places of the right pictures. (N, K) -> (K,)."""
    right = truth.gather(0, scores.argsort(dim=0, descending=True)).double()
    places = torch.arange(1, len(right) + 1)[:, None]
    return (right * right.cumsum(dim=0) / places).sum(dim=0) / right.sum(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128, help="side of a crop in pixels")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    keep_memory()
    torch.manual_seed(0)
    device = torch.device(args.device)
    half = has_bf16(device)

    data = load_tagged("folder", args.data)
    images, tags = read(data.labeled), data.tags
    truth = [set(read_mask(mask).ravel().tolist()) for _, mask in data.val]
    truth = torch.tensor([[k in shown for k in range(1, len(data.classes))] for shown in truth])
    whole = v2.Compose([v2.Resize(args.size, antialias=True), v2.CenterCrop(args.size)])
    val = torch.stack([whole(image) for image in read(data.val)])
    view = v2.Compose(
        [
            v2.RandomResizedCrop(args.size, scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.1),
        ]
    )
    net = torchvision.models.get_model(args.backbone, weights=None, num_classes=tags.shape[1])
    place(net, device)
    steps = len(images) // args.batch * args.epochs
    optimizer, schedule = sgd_poly([net], args.lr, 5e-4, steps)
    started = time.time()

    def scores(batch: Tensor) -> Tensor:
        batch = normalise(batch.to(device).float() / 255)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return net(batch.contiguous(memory_format=torch.channels_last)).float()

    for epoch in range(args.epochs):
        net.train()
        for chosen in torch.randperm(len(images)).split(args.batch)[: len(images) // args.batch]:
            batch = torch.stack([view(images[i]) for i in chosen.tolist()])
            loss = F.binary_cross_entropy_with_logits(
                scores(batch), tags[chosen].float().to(device)
            )
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if (epoch + 1) % 5 == 0 or epoch + 1 == args.epochs:
            net.eval()
            with torch.no_grad():
                found = torch.cat([scores(part) for part in val.split(64)]).cpu()
            precision = average_precision(found, truth).mean()
            print(
                f"epoch {epoch + 1}/{args.epochs}  loss {loss.item():.3f}  mean average precision "
                f"on validation {100 * precision:.1f}, {time.time() - started:.0f} s",
                flush=True,
            )
            state = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
            torch.save(state, args.output)


if __name__ == "__main__":
    main()
