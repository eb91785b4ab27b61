"""DeepLabv3+: architecture, cut points, weights."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common.deeplab import DeepLabV3Plus, Ensemble
from common.run import InputError


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_resnet50_has_the_published_size():
    net = DeepLabV3Plus(21, "resnet50")
    assert count(net.backbone) == 23_508_032
    # ASPP and decoder of specs of this head, then 256 x 21 weights and 21 biases.
    assert count(net.aspp) + count(net.reduce_low) + count(net.decoder) == 16_838_752
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
    images = torch.randn(2, 3, 64, 96)
    encoded = net.encode(images)
    decoded = net.decode(encoded)
    assert encoded.shape == (2, 304, 16, 24) and decoded.shape == (2, 256, 16, 24)
    assert net.classify(decoded).shape == (2, 5, 16, 24)
    torch.testing.assert_close(net.classify(decoded, (64, 96)), net(images))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (50, 100), (37, 64)])
def test_any_size_from_32_on(size):
    net = DeepLabV3Plus(3, "resnet18", width=8)
    for mode in (True, False):
        assert net.train(mode)(torch.randn(2, 3, *size)).shape == (2, 3, *size)


def test_smaller_pictures_are_refused():
    with pytest.raises(ValueError, match="32 x 32"):
        DeepLabV3Plus(3, "resnet18", width=8)(torch.randn(2, 3, 31, 64))


def test_a_batch_of_one_is_refused_in_training_alone():
    net = DeepLabV3Plus(3, "resnet18", width=8)
    with pytest.raises(ValueError, match="two pictures"):
        net(torch.randn(1, 3, 32, 32))
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_perturb_is_added_to_the_encoding():
    net = DeepLabV3Plus(3, "resnet18", width=8).eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 56, 8, 8)
    seen = []

    def perturb(encoded):
        seen.append(encoded)
        return noise

    expected = net.classify(net.decode(net.encode(images) + noise), (32, 32))
    torch.testing.assert_close(net(images, perturb), expected)
    torch.testing.assert_close(seen[0], net.encode(images))


def test_aspp_has_its_rates_and_pools_the_mean():
    net = DeepLabV3Plus(3, "resnet18", width=8).eval()
    dilations = [branch[0].dilation[0] for branch in net.aspp.branches]
    assert dilations == [1, 6, 12, 18]
    seen, high = [], torch.randn(2, 512, 4, 5)
    net.aspp.pooled.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.aspp(high)
    torch.testing.assert_close(seen[0], high.mean((2, 3), keepdim=True))


def test_resizing_does_not_align_corners():
    net = DeepLabV3Plus(3, "resnet18", width=8).eval()
    images, seen = torch.randn(1, 3, 64, 64), []
    net.aspp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    encoded = net.encode(images)
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    torch.testing.assert_close(encoded[:, :8], resize(seen[0], (16, 16)))
    decoded = net.decode(encoded)
    torch.testing.assert_close(
        net.classify(decoded, (64, 64)), resize(net.classify(decoded), (64, 64))
    )


def test_the_low_level_feature_trains_the_stem():
    net = DeepLabV3Plus(3, "resnet18", width=8)
    net.encode(torch.randn(2, 3, 32, 32))[:, 8:].sum().backward()
    assert net.backbone.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("place", range(3))
def test_dropout_is_applied_in_its_place(place):
    """At rate 1 nothing passes: ASPP's output, the decoder's middle, the classifier's input."""
    rates = [float(place == k) for k in range(3)]
    net = DeepLabV3Plus(3, "resnet18", None, 8, *rates)
    middle = []
    net.decoder[2].register_forward_pre_hook(lambda module, inputs: middle.append(inputs[0]))
    encoded = net.encode(torch.randn(2, 3, 32, 32))
    decoded = net.decode(encoded)
    logits = net.classify(decoded)
    bias = net.classifier.bias[None, :, None, None].expand_as(logits)
    dropped = [(encoded[:, :8] == 0).all(), (middle[0] == 0).all(), torch.equal(logits, bias)]
    # Behind zeros BatchNorm gives its bias, 0: the classifier's is left at the second place too.
    assert dropped == [place == 0, place == 1, place > 0]


def test_dropout_is_off_by_default_and_where_it_is_asked_for():
    def rates(net):
        return sorted(m.p for m in net.modules() if isinstance(m, nn.Dropout))

    assert set(rates(DeepLabV3Plus(3, "resnet18", width=8))) == {0.0}
    assert rates(DeepLabV3Plus(3, "resnet18", None, 8, 0.5, 0.4, 0.1)) == [0.1, 0.4, 0.5]


def test_new_layers_are_kaiming_and_heads_are_drawn_apart():
    torch.manual_seed(0)
    first, second = (DeepLabV3Plus(21, "resnet18") for _ in range(2))
    conv = first.decoder[0][0].weight
    assert conv.std().item() == pytest.approx((2 / (304 * 9)) ** 0.5, rel=0.02)
    assert first.classifier.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not torch.equal(conv, second.decoder[0][0].weight)


def test_logits_are_float32_under_autocast():
    net = DeepLabV3Plus(3, "resnet18", width=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, 32, 32)).dtype == torch.float32
    assert net.double()(torch.randn(2, 3, 32, 32).double()).dtype == torch.float64


def test_ensemble_is_the_mean_of_logits():
    nets = [DeepLabV3Plus(3, "resnet18", width=8) for _ in range(2)]
    model, images = Ensemble(nets).eval(), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images), (nets[0](images) + nets[1](images)) / 2)


# --- weights ---


@pytest.fixture
def state():
    torch.manual_seed(1)
    return torchvision.models.resnet18(num_classes=7).state_dict()


def test_a_path_fills_the_backbone_and_ignores_fc(state, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    net = DeepLabV3Plus(3, "resnet18", str(tmp_path / "weights.pth"), width=8)
    loaded = net.backbone.state_dict()
    assert loaded and all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_weights_none_is_random():
    torch.manual_seed(0)
    first = DeepLabV3Plus(3, "resnet18", "none", width=8)
    torch.manual_seed(0)
    second = DeepLabV3Plus(3, "resnet18", None, width=8)
    assert torch.equal(first.backbone.conv1.weight, second.backbone.conv1.weight)


def refusal(weights, backbone="resnet18"):
    """The one line that an InputError says."""
    with pytest.raises(InputError) as caught:
        DeepLabV3Plus(3, backbone, str(weights), width=8)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_that_do_not_fit_are_refused(state, tmp_path):
    path = tmp_path / "weights.pth"
    assert "neither a file nor one of IMAGENET1K_V1" in refusal(path)
    path.write_bytes(b"rubbish")
    assert "not a PyTorch state dict" in refusal(path)
    torch.save([1, 2], path)
    assert "holds no state dict" in refusal(path)
    torch.save(state, path)
    assert "does not fit resnet50" in refusal(path, "resnet50")
    torch.save({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, path)
    assert "layer1.0.conv1.weight" in refusal(path)
    torch.save({**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, path)
    assert "conv1.weight" in refusal(path)
    assert "unknown" in refusal("none", "resnet19")


def test_a_failed_download_says_what_to_do(monkeypatch):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    message = refusal("IMAGENET1K_V1")
    assert "resnet18-f37072fd.pth" in message and "give its path" in message


def test_an_enum_name_is_downloaded(state, monkeypatch):
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: dict(state)
    )
    net = DeepLabV3Plus(3, "resnet18", "IMAGENET1K_V1", width=8)
    assert torch.equal(net.backbone.conv1.weight, state["conv1.weight"])
