"""DeepLabv3+: architecture, cut points, weights."""

import os
import zipfile
from functools import partial
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common.deeplab import DeepLabV3Plus, DilatedConv, Ensemble, Together
from common.run import InputError

DROPOUT = dict(aspp_dropout=0.5, decoder_dropout=0.4, classifier_dropout=0.1)


def small(classes=3, **arguments):
    return DeepLabV3Plus(classes, "resnet18", **dict(width=8) | arguments)


def images(height=32, width=32, batch=2):
    return torch.randn(batch, 3, height, width)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_resnet50_has_the_published_size():
    net = DeepLabV3Plus(21, "resnet50")
    assert count(net.backbone) == 23_508_032
    # ASPP and decoder, then 256 x 21 weights and 21 biases.
    assert count(net.aspp, net.reduce_low, net.decoder) == 16_838_752
    assert count(net.classifier) == 5_397


@pytest.mark.parametrize(
    "backbone, dilations",
    [("resnet18", [2, 4]), ("resnet34", [2, 4, 8]), ("resnet50", [2, 4, 8])],
)
def test_layer4_keeps_the_stride_and_dilates(backbone, dilations):
    net = DeepLabV3Plus(3, backbone, width=16)
    for block, dilation in zip(net.backbone.layer4, dilations, strict=True):
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            assert conv.stride == (1, 1)
            if conv.kernel_size == (3, 3):
                assert conv.dilation == conv.padding == (dilation, dilation)


def test_cut_points_have_their_shapes_and_compose_to_forward():
    net = DeepLabV3Plus(5, "resnet18").eval()
    pictures = images(64, 96)
    encoded = net.encode(pictures)
    decoded = net.decode(encoded)
    assert encoded.shape == (2, 304, 16, 24) and decoded.shape == (2, 256, 16, 24)
    assert net.classify(decoded).shape == (2, 5, 16, 24)
    torch.testing.assert_close(net.classify(decoded, (64, 96)), net(pictures))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (50, 100), (37, 64)])
def test_any_size_from_32_on(size):
    net = small()
    for mode in (True, False):
        assert net.train(mode)(images(*size)).shape == (2, 3, *size)


def test_smaller_pictures_and_in_training_batches_of_one_are_refused():
    with pytest.raises(ValueError, match="32 x 32"):
        small()(images(31, 64))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        small()(images(batch=1))
    assert small().eval()(images(batch=1)).shape == (1, 3, 32, 32)


def test_perturb_is_added_to_the_encoding():
    net, pictures, noise, seen = small().eval(), images(), torch.randn(2, 56, 8, 8), []
    encoded = net.encode(pictures)
    expected = net.classify(net.decode(encoded + noise), (32, 32))
    torch.testing.assert_close(net(pictures, lambda z: seen.append(z) or noise), expected)
    torch.testing.assert_close(seen, [encoded])


def test_aspp_has_its_rates_and_pools_the_mean():
    net, seen, high = small().eval(), [], torch.randn(2, 512, 4, 5)
    assert [branch[0].dilation[0] for branch in net.aspp.branches] == [1, 6, 12, 18]
    net.aspp.pooled.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.aspp(high)
    torch.testing.assert_close(seen[0], high.mean((2, 3), keepdim=True))


def test_resizing_does_not_align_corners():
    net, seen = small().eval(), []
    net.aspp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    encoded = net.encode(images(64, 64))
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    torch.testing.assert_close(encoded[:, :8], resize(seen[0], (16, 16)))
    decoded = net.decode(encoded)
    large = resize(net.classify(decoded), (64, 64))
    torch.testing.assert_close(net.classify(decoded, (64, 64)), large)


@pytest.mark.parametrize("place", range(3))
def test_dropout_is_applied_in_its_place(place):
    """At rate 1 nothing passes: ASPP's output, the decoder's middle, the classifier's input."""
    rates = [float(place == k) for k in range(3)]
    net, middle = DeepLabV3Plus(3, "resnet18", None, 8, *rates), []
    net.decoder[2].register_forward_pre_hook(lambda module, inputs: middle.append(inputs[0]))
    encoded = net.encode(images())
    logits = net.classify(net.decode(encoded))
    bias = net.classifier.bias[None, :, None, None].expand_as(logits)
    dropped = [(encoded[:, :8] == 0).all(), (middle[0] == 0).all(), torch.equal(logits, bias)]
    # Behind zeros BatchNorm gives its bias, 0: the classifier's is left at the second place too.
    assert dropped == [place == 0, place == 1, place > 0]


def test_dropout_is_off_by_default_and_where_it_is_asked_for():
    for net, rates in ((small(), [0.0] * 3), (small(**DROPOUT), [0.5, 0.4, 0.1])):
        assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == rates


def test_new_layers_are_kaiming_and_heads_are_drawn_apart():
    first, second = (DeepLabV3Plus(21, "resnet18") for _ in range(2))
    conv = first.decoder[0][0].weight
    assert conv.std().item() == pytest.approx((2 / (304 * 9)) ** 0.5, rel=0.02)
    assert first.classifier.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not torch.equal(conv, second.decoder[0][0].weight)


def test_logits_are_float32_under_autocast():
    net = small()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images()).dtype == torch.float32
    assert net.double()(images().double()).dtype == torch.float64


def test_ensemble_is_the_mean_of_logits():
    nets, pictures = [small(), small()], images()
    model = Ensemble(nets).eval()
    torch.testing.assert_close(model(pictures), (nets[0](pictures) + nets[1](pictures)) / 2)


# --- weights ---


@pytest.fixture(scope="module")
def state():
    return torchvision.models.resnet18(num_classes=7).state_dict()


def test_a_path_fills_the_backbone_and_ignores_fc(state, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    loaded = small(weights=str(tmp_path / "weights.pth")).backbone.state_dict()
    assert loaded and all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_an_enum_name_is_downloaded(state, monkeypatch):
    download = lambda *args, **kwargs: dict(state)  # noqa: E731
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)
    net = small(weights="IMAGENET1K_V1")
    assert torch.equal(net.backbone.conv1.weight, state["conv1.weight"])


def refusal(weights, backbone="resnet18"):
    """The one line that an InputError says."""
    with pytest.raises(InputError) as caught:
        DeepLabV3Plus(3, backbone, str(weights), width=8)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_do_not_fit_are_refused(state, tmp_path):
    path = tmp_path / "weights.pth"
    other = "neither a PyTorch state dict ({}) nor one of IMAGENET1K_V1, DEFAULT, none"
    assert other.format("no file") in refusal(path)
    path.write_bytes(b"rubbish")
    assert "neither a PyTorch state dict" in refusal(path)
    name = "layer1.0.conv1.weight"
    for content, said in (
        ([1, 2], other.format("AttributeError")),
        ({k: v for k, v in state.items() if k != name}, name),
        ({**state, name: torch.zeros(64, 1, 3, 3)}, name),
    ):
        torch.save(content, path)
        assert said in refusal(path)
    torch.save(state, path)
    assert "does not fit resnet50" in refusal(path, "resnet50")
    assert refusal("x" * 10_000).startswith("--weights xxx")
    with zipfile.ZipFile(path) as whole:
        records = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:  # gigabytes fit in a few MB
        for name, content in records.items():
            packed.writestr(name, content + bytes(2**26) * name.endswith("pkl"))
    assert other.format("ValueError") in refusal(path)
    path.unlink()
    os.mkfifo(path)  # would be waited for
    assert other.format("OSError") in refusal(path)


def test_a_failed_download_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    message = refusal("IMAGENET1K_V1")
    assert "resnet18-f37072fd.pth" in message and "give its path" in message


def test_together_every_network_runs_once():
    nets, runs = [small().eval() for _ in range(3)], []
    for net in nets:
        net.register_forward_hook(lambda net, *_: runs.append(net))
    ours = Together([Ensemble(nets[:2]), nets[2], nets[0]])(x := images())
    assert runs == [nets[0], nets[1], nets[2]]
    expected = [(nets[0](x) + nets[1](x)) / 2, nets[2](x), nets[0](x)]
    torch.testing.assert_close(ours, torch.stack(expected))


@pytest.mark.parametrize("size, dilation", [((3, 3), 3), ((3, 4), 3), ((2, 5), 6), ((40, 31), 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_dilated_convolution_is_torchs_own(size, dilation, layout):
    """Values and gradients, on maps below and above the dilation, few pixels and many."""
    options = dict(padding=dilation, dilation=dilation, bias=False, dtype=torch.float64)
    plain, ours = nn.Conv2d(5, 4, 3, **options), DilatedConv(5, 4, 3, **options)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, *size, dtype=torch.float64).to(memory_format=layout)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(2, 4, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    for conv, given in ((plain, x1), (ours, x2)):
        (conv(given) * weights).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    torch.testing.assert_close(plain.weight.grad, ours.weight.grad)


def test_all_dilated_convolutions_of_a_network_are_of_that_kind():
    dilated = [m for m in small().modules() if isinstance(m, nn.Conv2d) and m.dilation != (1, 1)]
    assert len(dilated) == 4 + 3 and all(type(conv) is DilatedConv for conv in dilated)
