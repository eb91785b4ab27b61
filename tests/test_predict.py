"""Predictions: masks and overlays of any picture, the test split, the exported program."""

import math
import os
import pickle
import re
import warnings
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from few_shapes import TINY
from PIL import Image

from common import predict, shapes
from common.colors import colorize
from common.deeplab import DeepLabV3Plus, Ensemble
from common.flags import InputError
from common.layouts import read_mask
from common.metrics import confusion_matrix, iou, slide
from common.predict import load, overlay, segment

CLASSES = ["ground", "cat", "dog"]
COLORS = [[0, 0, 0], [200, 100, 50], [10, 250, 90]]


@pytest.fixture
def checkpoint(light, tmp_path):
    """A file as PS-MT leaves it, of two networks that predict all classes."""
    networks = [DeepLabV3Plus(3, "resnet18", width=8) for _ in range(2)]
    for network in networks:
        network.classifier.weight.data *= 20
    content = dict(
        networks=[network.state_dict() for network in networks],
        arguments=[network.arguments for network in networks],
        classes=CLASSES,
        colors=COLORS,
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.3, 0.4],
        window=0,
        step=1,
        miou=0.5,
    )
    torch.save(content, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def rewrite(checkpoint, **changed):
    """The checkpoint with other values; None: without the key."""
    content = torch.load(checkpoint, weights_only=True) | changed
    torch.save({k: v for k, v in content.items() if v is not None}, checkpoint)


def picture(height=40, width=60, seed=0):
    """Smooth colours (H, W, 3) uint8."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    how = Image.Resampling.BILINEAR
    return np.array(Image.fromarray(cells).resize((width, height), how))


def batch(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def call(capsys, *words):
    """The status of the command, what it prints and what it complains of."""
    with pytest.raises(SystemExit) as end:
        predict.main([*map(str, words)])
    return end.value.code or 0, *capsys.readouterr()


# --- load, segment ---


@pytest.mark.parametrize("flags", [{}, dict(eval_window=48), dict(amp="bf16")], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_any_scripts_checkpoint_predicts_what_its_run_evaluated(name, flags, few, light, tmp_path):
    script = import_module(name)
    flags = TINY[name] | flags
    result = script.train(script.Config(output_dir=str(tmp_path / "run"), **flags))
    counted, amp, window = {}, flags["amp"], flags.get("eval_window", 0)
    model = load(tmp_path / "run" / "last.pt", "cpu")
    assert (model.classes, model.colors) == (shapes.CLASSES, [*map(list, shapes.COLORS)])
    assert isinstance(model.model, Ensemble) == (name == "psmt")
    for image in (f"shapes:{name}" for name in shapes.names("val")):
        truth = torch.from_numpy(read_mask(image))
        for who, mask in (
            ("load", segment(model, image, amp=amp)),
            ("result", result.segment(image, window, amp)),
        ):
            counts = confusion_matrix(torch.from_numpy(mask), truth, 7)
            counted[who] = counted.get(who, 0) + counts
    for counts in counted.values():
        ious = [None if math.isnan(value) else value for value in iou(counts).tolist()]
        assert ious == list(result.history[-1]["iou"].values())
    assert repr(result) == (
        f"Result(mIoU {100 * result.miou:.2f}, {len(result.history)} "
        f"evaluation{'s' * (len(result.history) > 1)}, {tmp_path / 'run'})"
    )


def test_a_checkpoint_says_how_pictures_are_normalised(few, light, tmp_path):
    script = import_module("cps")
    script.train(script.Config(output_dir=str(tmp_path), eval_window=48, **TINY["cps"]))
    for name in ("last.pt", "best.pt"):
        content = torch.load(tmp_path / name, weights_only=True)
        assert content["mean"] == [0.485, 0.456, 0.406] and content["std"] == [0.229, 0.224, 0.225]
        assert content["window"] == 48 == load(tmp_path / name, "cpu").window


def test_the_model_is_the_mean_of_logits_of_normalised_pictures(checkpoint):
    """As plain PyTorch reads the file."""
    content, images = torch.load(checkpoint, weights_only=True), batch(picture())
    mean, std = (torch.tensor(content[key]).view(3, 1, 1) for key in ("mean", "std"))
    networks = [DeepLabV3Plus(**arguments).eval() for arguments in content["arguments"]]
    for network, state in zip(networks, content["networks"], strict=True):
        network.load_state_dict(state)
    normal = (images / 255 - mean) / std
    with torch.no_grad():
        expected = (networks[0](normal) + networks[1](normal)) / 2
        torch.testing.assert_close(load(checkpoint, "cpu")(images), expected)
    mask = segment(load(checkpoint, "cpu"), picture(), amp="none")
    assert (mask == expected.argmax(1)[0].numpy()).mean() > 0.999 and len(np.unique(mask)) == 3


def shared(depth):
    """A list of 2^depth entries, in as many bytes as it is deep."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


HUGE = dict(num_classes=3, backbone="resnet18", width=10**5)
OTHERS = [  # values of a file that is not what a run writes
    dict(arguments=[HUGE] * 2),  # 700 GB
    dict(arguments=[HUGE | dict(width=10**18)] * 2),
    dict(arguments=[HUGE | dict(width=8, weights="IMAGENET1K_V1")]),
    dict(arguments=[7, 7]),
    dict(arguments=shared(40)),
    dict(networks=[{}, {}]),
    dict(networks=[]),
    dict(classes=CLASSES[:2]),
    dict(classes=[1, 2, 3]),
    dict(classes=shared(40)),
    dict(colors=COLORS[:2]),
    dict(colors=[[0, 0]] * 3),
    dict(colors=[[0, 0, 256]] * 3),
    dict(colors=[["a", "b", "c"]] * 3),
    dict(window=31),
    dict(window=-64),
    dict(window="64"),
    dict(mean=[0.5]),
    dict(mean=None),
    dict(std=[1j, 1j, 1j]),
    dict(miou=10**400),
    dict(miou="0.5"),
]


@pytest.mark.parametrize("changed", OTHERS, ids=range(len(OTHERS)))
def test_a_checkpoint_of_other_values_is_refused(changed, checkpoint):
    """Quickly, in little memory, and without a download."""
    rewrite(checkpoint, **changed)
    with pytest.raises(InputError, match=r"holds no network of these scripts \(\w+\); give"):
        load(checkpoint, "cpu")


def test_a_run_that_was_never_evaluated_says_so(checkpoint, capsys):
    load(checkpoint, "cpu")
    assert capsys.readouterr().err == ""
    rewrite(checkpoint, miou=math.nan)
    load(checkpoint, "cpu")
    said = f"{checkpoint}: never evaluated; its network may be untrained\n"
    assert capsys.readouterr().err == said


def test_every_kind_of_image_has_one_mask(checkpoint, tmp_path):
    model, pixels = load(checkpoint, "cpu"), picture()
    mask = segment(model, pixels)
    assert mask.shape == (40, 60) and mask.dtype == np.uint8 and len(np.unique(mask)) > 1
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frozen = pixels.copy()
    frozen.setflags(write=False)
    backwards = np.ascontiguousarray(pixels[..., ::-1])[..., ::-1]  # as from OpenCV's BGR
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        assert np.array_equal(segment(model, same), mask)
    for same in (frozen, backwards, pixels.copy(order="F")):
        assert np.array_equal(segment(model, same), mask)
    tensor = segment(model, batch(pixels)[0])
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), mask)
    assert np.array_equal(segment(model.train(), pixels), mask) and model.training


def test_pillow_images_and_paths_are_turned_as_their_exif_says(checkpoint, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    model = load(checkpoint, "cpu")
    expected = segment(model, np.ascontiguousarray(picture().transpose(1, 0, 2)[:, ::-1]))
    assert expected.shape == (60, 40)
    for image in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        assert np.array_equal(segment(model, image), expected)


@pytest.mark.parametrize(
    "image",
    [
        picture() / 255,
        picture()[..., 0],
        picture()[..., [0, 1, 2, 2]],
        picture().transpose(2, 0, 1),
        picture()[:0],
        batch(picture()),
        batch(picture())[0] / 255,
        torch.from_numpy(picture()),
        [[1, 2, 3]],
        Image.fromarray(np.zeros((40, 40), np.uint16)),
    ],
    ids=lambda image: f"{type(image).__name__} {tuple(getattr(image, 'shape', ''))}",
)
def test_what_is_no_picture_is_refused(image, checkpoint):
    said = r"^image: (must be .*, not \w+ \(|has Pillow mode I;16)"
    with pytest.raises(InputError, match=said) as error:
        segment(load(checkpoint, "cpu"), image)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 50), (50, 1), (31, 31), (32, 31), (33, 32), (32, 200)]
)
def test_small_pictures_are_seen_amid_the_mean_colour(size, checkpoint):
    model, pixels = load(checkpoint, "cpu"), picture(*size)
    height, width = size
    images = (batch(pixels) / 255 - model.mean) / model.std
    images = F.pad(images, (0, max(32 - width, 0), 0, max(32 - height, 0)))
    with torch.no_grad():
        expected = model.model(images)[..., :height, :width]
        torch.testing.assert_close(model(batch(pixels)), expected)
    for window in (0, 32, 40):
        assert segment(model, pixels, window).shape == size


def test_windows_that_cover_a_picture_see_what_the_whole_picture_is(checkpoint):
    model, pixels = load(checkpoint, "cpu"), picture(50, 70)
    whole = segment(model, pixels, amp="none")
    for window in (70, 71, 512):
        assert np.array_equal(segment(model, pixels, window, "none"), whole)
    with torch.no_grad():
        logits = torch.cat([*slide(model, batch(pixels), 40, 27)], dim=-2)
    parts = segment(model, pixels, 40, "none")
    assert np.array_equal(parts, logits.argmax(1)[0].numpy()) and not np.array_equal(parts, whole)
    model.window = 40  # as its run evaluated: the default
    assert np.array_equal(segment(model, pixels, amp="none"), parts)
    assert np.array_equal(segment(model, pixels, 0, "none"), whole)


def test_an_overlay_is_half_the_colour_with_white_borders():
    pixels = np.full((2, 5, 3), 101, np.uint8)
    mask = np.array([[0, 0, 1, 1, 1], [0, 0, 1, 1, 2]], np.uint8)
    turned = overlay(pixels.transpose(1, 0, 2), mask.T, COLORS).transpose(1, 0, 2)
    for shown in (overlay(pixels, mask, COLORS), turned):
        assert shown[:, :2].tolist() == [[[101] * 3] * 2] * 2  # black: as it is
        assert (shown[:, 2] == 255).all() and (shown[1, 4] == 255).all()
        assert shown[0, 3].tolist() == shown[0, 4].tolist() == [150, 100, 75]
    assert (pixels == 101).all()


# --- the command ---


def every_kind(folder):
    """Pictures of all kinds: by name, the size of those that can be predicted, height first."""
    rgb = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = 8
    saved = {
        "rgb.jpg": (rgb, {}),
        "grey.png": (rgb.convert("L"), {}),
        "grey_alpha.png": (rgb.convert("LA"), {}),
        "palette.png": (rgb.convert("P"), {}),
        "sub/animation.gif": (rgb, dict(save_all=True, append_images=[rgb.transpose(0)])),
        "sub/CMYK.JPEG": (rgb.convert("CMYK"), {}),
        "sub/deeper/a.b.tif": (rgb.convert("CMYK"), {}),
        "alpha.webp": (rgb.convert("RGBA"), {}),
        "bits.bmp": (rgb.convert("1"), {}),
        "one pixel.png": (rgb.resize((1, 1)), {}),
        "thin.png": (rgb.resize((300, 2)), {}),
        "turned.jpg": (rgb, dict(exif=exif)),
        "deep.png": (Image.fromarray(np.full((40, 60), 9000, np.uint16)), {}),
        "float.tif": (Image.fromarray(np.ones((40, 60), np.float32)), {}),
    }
    for name, (image, options) in saved.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **options)
    (folder / "broken.png").write_bytes(b"memory")
    (folder / "sub" / "short.jpg").write_bytes((folder / "rgb.jpg").read_bytes()[:400])
    bomb = (folder / "grey.png").read_bytes()
    width = (10**6).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bomb[:16] + width + width + bomb[24:])
    (folder / "._rgb.jpg").write_bytes(b"of macOS")
    special = {"one pixel.png": (1, 1), "thin.png": (2, 300), "turned.jpg": (60, 40)}
    broken = {"deep.png", "float.tif", "broken.png", "sub/short.jpg", "bomb.png"}
    return {name: special.get(name, (40, 60)) for name in saved if name not in broken}, broken


def test_a_folder_of_every_kind_predicts_or_names(checkpoint, tmp_path, monkeypatch, capsys):
    photos, masks, bars = tmp_path / "photos", tmp_path / "masks", []

    class Bar(predict.tqdm):
        def __init__(self, items, title, **how):
            bars.append((title, len(items)))
            super().__init__(items, title, **how)

    monkeypatch.setattr(predict, "tqdm", Bar)
    good, broken = every_kind(photos)
    status, out, err = call(
        capsys, checkpoint, photos, "--output", masks, "--overlay", "--device", "cpu"
    )
    lines = err.splitlines()
    assert bars == [("predicting", len(good) + len(broken))]
    assert status == 1 and len(lines) == len(broken)
    for name in broken:
        assert sum(line.startswith(f"predict.py: {photos / name}: ") for line in lines) == 1
    assert f"{len(good) + len(broken)} pictures, {len(broken)} of them skipped: {masks}\n" in out
    model, names = load(checkpoint, "cpu"), set()
    for name, size in good.items():
        target = masks / Path(name).with_suffix(".png")
        mask = Image.open(target)
        values = np.array(mask)
        assert mask.mode == "P" and values.shape == size
        assert np.array_equal(values, segment(model, photos / name))
        shown = colorize(values, COLORS)
        assert np.array_equal(np.array(mask.convert("RGB")), shown)
        over = target.with_name(f"{target.stem}_overlay.jpg")
        expected = overlay(photos / name, values, COLORS).astype(int)
        found = np.array(Image.open(over).convert("RGB")).astype(int)
        assert found.shape == (*size, 3) and abs(found - expected).mean() < 8
        names |= {target, over}
    assert {path for path in masks.rglob("*") if path.is_file()} == names
    assert np.array(Image.open(masks / "palette.png")).max() < 3


def test_statuses_of_one_picture(checkpoint, tmp_path, capsys):
    good, bad, out = tmp_path / "a.b.jpg", tmp_path / "bad.jpg", tmp_path / "out"
    Image.fromarray(picture()).save(good)
    bad.write_bytes(b"rubbish")
    status, said, err = call(capsys, checkpoint, good, "--output", out)
    assert (status, err) == (0, "") and said == f"1 picture: {out}\n"
    assert [path.name for path in out.iterdir()] == ["a.b.png"]
    status, _, err = call(capsys, checkpoint, bad, "--output", out)
    assert status == 1 and err.startswith(f"predict.py: {bad}: not a readable picture")


def test_large_pictures_are_no_bombs_yet(checkpoint, tmp_path, monkeypatch, capsys):
    """Pillow warns from so many pixels on, and refuses twice as many."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    words = checkpoint, tmp_path / "a.png", "--output", tmp_path / "out"
    for limit, expected in ((40 * 60 - 1, 0), (40 * 60 // 2 - 1, 1)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            status, _, err = call(capsys, *words)
        assert status == expected and err.count(f"{tmp_path / 'a.png'}: not a readable") == status


def test_files_left_out_by_their_names_are_told(checkpoint, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(picture()).save(photos / "a.png")
    (photos / "b.heic").touch()
    (photos / "c.txt").touch()
    (photos / "d.jpg").symlink_to(photos / "gone.jpg")
    for _ in range(2):  # the masks of the first call are neither pictures nor left over
        status, _, err = call(capsys, checkpoint, photos, "--output", photos / "out")
        assert (status, err) == (0, f"left out, no pictures: {photos / 'b.heic'} and 2 more\n")


def test_no_picture_is_replaced_and_no_mask_predicted(checkpoint, tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "photos").mkdir(parents=True)
    for name in ("a.png", "photos/a.png"):
        Image.fromarray(picture()).save(photos / name)
    before = (photos / "a.png").read_bytes()
    for place, words, said in (
        (photos, [photos], "holds the pictures; name another folder"),
        (photos, [photos / "a.png"], "would replace the picture"),
        # photos/photos/a.png goes where photos/a.png is
        (tmp_path, [photos], "would replace the picture"),
    ):
        status, _, err = call(capsys, checkpoint, *words, "--output", place)
        assert status == 2 and said in err and err.count("\n") == 1
    assert (photos / "a.png").read_bytes() == before
    for _ in range(2):
        status, out, _ = call(capsys, checkpoint, photos, "--output", photos / "m")
        assert status == 0 and out == f"2 pictures: {photos / 'm'}\n"
    assert len([*photos.rglob("*.png")]) == 4


REFUSED = {
    "no checkpoint": ("missing.pt photos --output out", "missing.pt: no such file; give the last"),
    "a folder": ("photos photos --output out", "photos: holds no network"),
    "rubbish": ("rubbish.pt photos --output out", "rubbish.pt: holds no network"),
    "weights": ("weights.pt photos --output out", "weights.pt: holds no network"),
    "no pictures": ("model.pt nowhere --output out", "nowhere: no such picture or folder"),
    "empty": ("model.pt empty --output out", "empty: holds no picture (.bmp"),
    "a file": ("model.pt photos --output model.pt", "--output model.pt: is a file; name a folder"),
    "half": ("model.pt photos --output out --amp fp16", "--amp fp16: for CUDA GPUs alone"),
    "packed": (
        "packed.pt photos --output out",
        "packed.pt: holds no network of these scripts (ValueError)",
    ),
    "a program": (
        "program.pt photos --output out",
        "program.pt: holds no network of these scripts (",
    ),
    "a pipe": ("pipe photos --output out", "pipe: holds no network of these scripts (OSError)"),
    "no task": ("model.pt photos", "--output --test-split --export"),
    "two tasks": ("model.pt photos --output out --test-split", "not allowed with"),
    "no folder": ("model.pt --output out", "PICTURES: goes with --output"),
    "pictures too many": ("model.pt photos --export a.pt2", "not with --export"),
    "overlay": ("model.pt photos --test-split --overlay", "--overlay: goes with --output"),
    "window": ("model.pt photos --output out --window 31", "--window 31: must be 0, or 32"),
    "negative": ("model.pt photos --output out --window -1", "--window -1: must be 0, or 32"),
    "unknown": ("model.pt photos --output out --windows 64", "--windows"),
    "device": ("model.pt photos --output out --device tpu9", "--device tpu9: unknown"),
    "amp": ("model.pt photos --output out --amp fp8", "--amp"),
    "no file": ("model.pt --export rubbish.pt/a.pt2", "rubbish.pt"),
    "no test": ("model.pt photos --test-split", "classes.txt: missing"),
}


@pytest.mark.parametrize("words, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_right_ends_with_one_line_and_status_2(
    words, said, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir(), Path("empty").mkdir()
    Image.fromarray(picture()).save("photos/a.png")
    Path("rubbish.pt").write_bytes(b"rubbish")
    Path("program.pt").write_bytes(pickle.dumps(Touch()))
    os.mkfifo("pipe")  # would be waited for
    with zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("packed/data.pkl", bytes(2**24))
    torch.save(DeepLabV3Plus(3, "resnet18", width=8).state_dict(), "weights.pt")
    status, out, err = call(capsys, *words.split())
    assert (status, out) == (2, "") and said in err and re.fullmatch(r"predict\.py: .*\n", err)
    assert not Path("out").exists() and not Path("touched").exists()


class Touch:
    """Unpickled, it runs a program."""

    def __reduce__(self):
        return os.system, ("touch touched",)


def test_a_picture_beyond_memory_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "ab":
        Image.fromarray(picture()).save(photos / f"{name}.png")
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()]
    errors += [RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried")]
    for error in errors:
        failing = [error]

        def scarce(*args, failing=failing, **options):
            if failing:
                raise failing.pop()
            return segment(*args, **options)

        monkeypatch.setattr(predict, "segment", scarce)
        status, out, err = call(capsys, checkpoint, photos, "--output", tmp_path / "m")
        assert status == 1 and out.startswith("2 pictures, 1 of them skipped")
        assert err.startswith(f"predict.py: {photos / 'a.png'}: does not fit into memory; give --w")
        assert err.count("\n") == 1
    monkeypatch.setattr(predict, "segment", lambda *_, **__: exec("raise RuntimeError('a bug')"))
    with pytest.raises(RuntimeError, match="a bug"):
        call(capsys, checkpoint, photos, "--output", tmp_path / "m")


# --- the test split ---


def with_test(root):
    """A folder dataset with a test split alone: three pictures of two sizes, one of them small."""
    rng = np.random.default_rng(1)
    for name, size in (("a", (48, 64)), ("b/c", (48, 64)), ("d", (20, 70))):
        trees.save_picture(root / "images" / "test" / f"{name}.png", rng, *size)
        trees.save_mask(root / "masks" / "test" / f"{name}.png", trees.blobs(rng, 3, *size))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


@pytest.mark.parametrize("window", [0, 40])
def test_the_test_split_is_scored(window, checkpoint, tmp_path, capsys):
    root, model = with_test(tmp_path / "data"), load(checkpoint, "cpu")
    counts = 0
    for image in sorted((root / "images").rglob("*.png")):
        mask = Path(str(image).replace("images", "masks"))
        mask = torch.from_numpy(np.array(Image.open(mask)))
        seen = torch.from_numpy(segment(model, image, window, "none"))
        counts = counts + confusion_matrix(seen, mask, 3)
    words = [
        checkpoint,
        root,
        "--test-split",
        "--amp",
        "none",
        "--window",
        window,
        "--device",
        "cpu",
    ]
    status, out, err = call(capsys, *words)
    rows = [f"{name}\t{100 * value:.2f}" for name, value in zip(CLASSES, iou(counts), strict=True)]
    assert (status, err) == (0, "")
    assert out.splitlines() == [*rows, f"mean\t{100 * iou(counts).nanmean():.2f}"]


def test_a_test_split_that_cannot_be_scored_is_refused(checkpoint, tmp_path, capsys):
    root = with_test(tmp_path / "data")

    def said():
        status, out, err = call(capsys, checkpoint, root, "--test-split")
        assert (status, out) == (2, "") and err.count("\n") == 1
        return err

    (root / "classes.txt").write_text("ground\ndog\ncat\n")
    assert "lists ground, dog, cat; the checkpoint's classes are ground, cat, dog" in said()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    trees.save_mask(root / "masks" / "test" / "a.png", np.full((48, 64), 7))
    assert f"{root / 'masks' / 'test' / 'a.png'}: holds the values 7" in said()
    (root / "masks" / "test" / "a.png").unlink()
    assert f"{root / 'images' / 'test' / 'a.png'}: has no mask in" in said()
    for path in (root / "images").rglob("*.png"):
        path.unlink()
    assert f"{root / 'images' / 'test'}: holds no picture" in said()
    (root / "images" / "test").rename(root / "images" / "val")
    assert f"{root / 'images' / 'test'}: missing; the layout is classes.txt, images/" in said()


# --- export ---


def test_the_exported_program_is_the_model_at_any_size(checkpoint, tmp_path, capsys):
    path = tmp_path / "programs" / "model.pt2"
    status, out, err = call(capsys, checkpoint, "--export", path, "--device", "cpu")
    assert (status, err) == (0, "") and out.startswith(f"{path}: takes uint8 RGB (B, 3, H, W)")
    program, model = torch.export.load(path).module(), load(checkpoint, "cpu")
    for size in ((1, 32, 32), (2, 64, 96), (3, 33, 47), (1, 300, 65), (1, 32, 400)):
        images = torch.randint(256, (size[0], 3, *size[1:]), dtype=torch.uint8)
        logits = program(images)
        assert logits.shape == (size[0], 3, *size[1:]) and not logits.requires_grad
        torch.testing.assert_close(logits, model(images).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.zeros(1, 3, 31, 64, dtype=torch.uint8))
