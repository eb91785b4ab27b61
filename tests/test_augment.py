"""Geometry: picture and label keep showing the same pixels. CutMix: the published distribution."""

import pytest
import torch

from common import augment
from common.augment import cutmix_masks, mix, random_crop, random_flip, train_view, whole_view

CODES = 6  # a picture whose colour is label / 10 shows where its label's pixels went


def coded(height=40, width=56, block=8):
    label = torch.randint(CODES, (height // block, width // block))
    label = label.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return label[None].expand(3, -1, -1).float() / 10, label


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("crop", [32, 64])
def test_crop_keeps_picture_and_label_together(scale, crop):
    """Wherever the label is known, the picture has its colour; blocks' edges may blend."""
    for _ in range(20):
        image, label, valid = random_flip(*random_crop(*coded(), crop, scale))
        assert image.shape == (3, crop, crop) and label.shape == valid.shape == (crop, crop)
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
        assert valid.dtype == torch.bool and torch.equal(label != 255, valid)
        exact = (image[0] * 10 - label)[valid].abs() < 1e-5
        # The nearest label and the bilinear colour agree but for half a pixel at the edges.
        assert exact.all() if scale == 1.0 else exact.float().mean() > 0.5


def test_doubling_is_exact_away_from_edges():
    """Each source pixel becomes 2 x 2 of the same label: no half-pixel shift."""
    label = torch.arange(64).reshape(8, 8)
    picture = label[None].expand(3, -1, -1).float()
    image, scaled, valid = random_crop(picture, label, 16, 2.0)
    assert valid.all()
    assert torch.equal(scaled, label.repeat_interleave(2, 0).repeat_interleave(2, 1))
    means = image[0].reshape(8, 2, 8, 2).mean((1, 3))[1:-1, 1:-1]
    torch.testing.assert_close(means, picture[0, 1:-1, 1:-1])


def test_a_third_of_the_size_shows_the_middle_of_each_three():
    """Label and picture are both read at pixels' centres."""
    label = torch.arange(96).expand(96, 96)
    picture = label[None].expand(3, -1, -1).float()
    image, scaled, _ = random_crop(picture, label, 32, 1 / 3)
    assert torch.equal(scaled, label[1::3, 1::3])
    torch.testing.assert_close(image[0], scaled.float())


def test_padding_is_centred_mean_colour_and_void():
    image, label, valid = random_crop(*coded(16, 24), 64, 1.0)
    rows, columns = torch.where(valid)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 39, 20, 43)
    assert valid.sum() == 16 * 24 and (label[~valid] == 255).all()
    padded = image[:, ~valid]
    torch.testing.assert_close(padded, augment.MEAN[:, 0].expand_as(padded))
    assert augment.normalise(image)[:, ~valid].abs().max() < 1e-6


def test_void_inside_the_picture_is_valid():
    picture, label = coded()
    assert random_crop(picture, torch.full_like(label, 255), 32, 1.0)[2].all()


def test_every_offset_and_both_flips_occur():
    label = torch.arange(40 * 40).reshape(40, 40)
    picture = torch.zeros(3, 40, 40)
    corners = {int(random_crop(picture, label, 32, 1.0)[1][0, 0]) for _ in range(1500)}
    assert corners == {row * 40 + column for row in range(9) for column in range(9)}
    flips = sum(torch.equal(random_flip(label)[0], label.flip(-1)) for _ in range(400))
    assert 150 < flips < 250


def test_only_surviving_pixels_are_resized(monkeypatch):
    sizes, resize = [], augment.F.interpolate
    note = lambda x, *a, **k: sizes.append(x.shape[-2:]) or resize(x, *a, **k)  # noqa: E731
    monkeypatch.setattr(augment.F, "interpolate", note)
    random_crop(torch.rand(3, 400, 500), torch.zeros(400, 500), 32, 2.0)
    assert sizes == [(16, 16), (16, 16)]


def test_bytes_become_floats():
    picture = torch.full((3, 40, 40), 51, dtype=torch.uint8)
    label = torch.zeros(40, 40, dtype=torch.uint8)
    image, label, _ = random_crop(picture, label, 32, 1.0)
    torch.testing.assert_close(image, torch.full((3, 32, 32), 0.2))
    image, label = whole_view(picture, label)
    torch.testing.assert_close(image[0], torch.full((40, 40), (0.2 - 0.485) / 0.229))
    assert label.dtype == torch.int64


def test_train_view_draws_all_scales_and_shares_geometry_with_the_strong_view():
    views = [train_view(*coded(40, 40), 64, (0.5, 1.0)) for _ in range(40)]
    shares = {valid.float().mean().item() for _, _, valid in views}
    assert shares == {(20 / 64) ** 2, (40 / 64) ** 2}
    image, _, _, strong = train_view(*coded(), 32, (1.0, 2.0), strong=lambda x: x / 2)
    strong, weak = (view * augment.STD + augment.MEAN for view in (strong, image))
    torch.testing.assert_close(strong, weak / 2)


def test_photometry_keeps_range_and_shape():
    image = torch.rand(3, 32, 32)
    views = [augment.photometry()(image) for _ in range(20)]
    assert all(v.shape == image.shape and v.min() >= 0 and v.max() <= 1 for v in views)
    assert sum(not torch.equal(v, image) for v in views) > 10


# --- CutMix ---


def test_masks_have_the_published_statistics():
    masks = cutmix_masks(2000, 128, 128)
    assert masks.shape == (2000, 1, 128, 128) and masks.dtype == torch.bool
    share = masks.float().mean((1, 2, 3))
    assert share.mean().item() == pytest.approx(0.254, abs=0.005)
    for quantile, value in ((0.05, 0.147), (0.5, 0.250), (0.95, 0.369)):
        assert share.quantile(quantile).item() == pytest.approx(value, abs=0.012)
    assert masks[:, 0, 64, 64].float().mean().item() == pytest.approx(0.477, abs=0.04)
    assert masks[:, 0, 0, 0].float().mean() < 0.01


@pytest.mark.parametrize(
    "height, width, boxes, area",
    [(64, 64, 3, (0.9, 0.9)), (120, 90, 1, (0.25, 0.5)), (60, 90, 3, (0.25, 0.5))],
)
def test_masks_are_rectangles_that_cancel_where_they_overlap(height, width, boxes, area):
    """As shares of the sides a^e / sqrt(boxes), a^(1 - e) / sqrt(boxes), a and e uniform."""
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    masks = cutmix_masks(20, height, width, boxes, area, generators[0])[:, 0]
    uniform = torch.rand(4, 20, boxes, 1, generator=generators[1], dtype=torch.float64)
    painted = torch.zeros(20, height, width, dtype=torch.int64)
    for mask, draws in zip(painted, uniform.permute(1, 2, 0, 3).tolist(), strict=True):
        for (a,), (e,), (v,), (u,) in draws:
            share = area[0] + a * (area[1] - area[0])
            high, wide = (
                round(share**e / boxes**0.5 * height),
                round(share ** (1 - e) / boxes**0.5 * width),
            )
            top, left = round((height - high) * v), round((width - wide) * u)
            mask[top : top + high, left : left + wide] += 1
    assert torch.equal(masks, painted % 2 == 1) and painted.max() == min(boxes, 3)


def test_a_generator_makes_the_masks_repeatable():
    draws = [cutmix_masks(4, 32, 32, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])


def test_mix_takes_the_picture_before_inside_the_mask():
    """Pictures, labels, and a picture whose colour is its label, alike."""
    masks, labels = cutmix_masks(3, 16, 16), torch.randint(CODES, (3, 16, 16))
    images = torch.stack([labels, -labels], dim=1)
    mixed_images, mixed_labels = mix(images, masks), mix(labels, masks)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, (3, 16, 16))).tolist():
        source = (b - 1) % 3 if masks[b, 0, i, j] else b
        assert torch.equal(mixed_images[b, :, i, j], images[source, :, i, j])
        assert mixed_labels[b, i, j] == labels[source, i, j]


def test_a_picture_of_bytes_is_resized_as_one_of_floats_but_for_rounding():
    """To whole bytes, along rows and then columns; the label is the same."""
    image, label = torch.randint(256, (3, 40, 51)).byte(), torch.randint(256, (40, 51)).byte()
    for scale in (0.6, 1.7):
        crops = []
        for picture in (image, image / 255):
            torch.manual_seed(0)
            crops.append(random_crop(picture, label, 32, scale))
        (ours, *labels), (exact, *expected) = crops
        difference = 255 * (ours - exact)
        assert 0.1 < difference.std() < 0.5 and difference.abs().max() < 1.01
        assert difference.mean().abs() < 0.3  # halves are rounded up, twice
        assert all(torch.equal(*pair) for pair in zip(labels, expected, strict=True))
