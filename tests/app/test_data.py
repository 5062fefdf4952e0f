from __future__ import annotations

import gzip
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from regrow.app import data
from regrow.app.data import Data, DataError, augment, batches, load, normalize
from support.app import png, table, write_parquet

RNG = np.random.default_rng(0)
TRAIN, TEST = RNG.integers(0, 256, (2, 6, 5, 4), dtype=np.uint8)
TRAIN_Y, TEST_Y = np.array([0, 1, 2, 0, 1, 2]), np.array([2, 1, 0, 2, 1, 0])
COLOUR = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, mark: str = "-", end: str = "") -> dict[str, Path]:
    parts = {
        "train-images": TRAIN, "train-labels": TRAIN_Y, "t10k-images": TEST, "t10k-labels": TEST_Y,
    }  # fmt: skip
    paths = {}
    for name, array in parts.items():
        paths[name] = folder / f"{name}{mark}idx{array.ndim}-ubyte{end}"
        paths[name].write_bytes(gzip.compress(idx(array)) if end else idx(array))
    return paths


def written(path: Path, images: np.ndarray = COLOUR, labels: np.ndarray = TRAIN_Y, **names: str) -> Path:
    return write_parquet(path, images, labels, **names)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, name: str = "own") -> str:
    with pytest.raises(DataError) as caught:
        load(name, folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and message.endswith(".")
    return message


def test_digits_are_whole_stratified_and_always_the_same() -> None:
    digits, again = load("digits", None), load("digits", None)
    assert digits.train_x.shape == (1437, 1, 8, 8) and digits.test_x.shape == (360, 1, 8, 8)
    assert digits.train_x.dtype == torch.float32 and digits.train_y.dtype == torch.int64
    per_class = [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert digits.classes == 10 and digits.test_y.bincount().tolist() == per_class
    assert digits.test_y[:8].tolist() == [7, 6, 3, 7, 7, 3, 2, 8]
    assert all(torch.equal(a, b) for a, b in zip(digits[1:5], again[1:5], strict=True))
    together = torch.cat((digits.train_x, digits.test_x)).flatten(1)
    assert len(together.unique(dim=0)) == 1797 and together.max() == 16


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("mark", ["-", "."])
def test_idx_files_are_read_under_every_spelling(tmp_path: Path, mark: str, end: str) -> None:
    write_idx(tmp_path, mark, end)
    before = snapshot(tmp_path)
    got = load("own", tmp_path)
    assert (got.name, got.classes, got.train_x.dtype, got.train_y.dtype) == (
        "own",
        3,
        torch.uint8,
        torch.int64,
    )
    np.testing.assert_array_equal(got.train_x.numpy(), TRAIN[:, None])
    np.testing.assert_array_equal(got.test_x.numpy(), TEST[:, None])
    np.testing.assert_array_equal(got.train_y.numpy(), TRAIN_Y)
    np.testing.assert_array_equal(got.test_y.numpy(), TEST_Y)
    assert snapshot(tmp_path) == before


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    paths = write_idx(tmp_path, end=".gz")
    paths["train-images"].write_bytes(idx(TRAIN))
    assert load("own", tmp_path).train_x.shape == (6, 1, 5, 4)


def test_the_folder_names_the_data_where_the_name_is_the_default(tmp_path: Path) -> None:
    write_idx(tmp_path)
    assert load("digits", tmp_path).name == tmp_path.name
    assert "mnist (1, 28, 28) in 10" in refused(tmp_path, "mnist")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[:-7], "6 x 5 x 4 = 120 bytes but holds 113"),
        (lambda raw: raw + b"x", "6 x 5 x 4 = 120 bytes but holds 121"),
        (lambda raw: raw[:9], "has 9 bytes"),
        (lambda raw: b"", "has 0 bytes that begin with 0x,"),
        (lambda raw: b"\0\0\x08\x01" + raw[4:], "0x00000801, not with the 0x00000803"),
        (lambda raw: b"\0\0\x0d\x03" + raw[4:], "0x00000d03, not"),
        (lambda raw: gzip.compress(raw)[:-9], "cannot be read"),
        (lambda raw: gzip.compress(raw)[:10] + b"\xff" + gzip.compress(raw)[11:], "cannot be read"),
        (lambda raw: gzip.compress(raw)[:20] + b"spoilt" + gzip.compress(raw)[26:], "cannot be read"),
        (lambda raw: idx(TRAIN[:5]), "holds 5 images but train-labels-idx1-ubyte 6 labels"),
        (lambda raw: idx(TRAIN[:, :3]), "(1, 3, 4) but test images (1, 5, 4)"),
    ],
)
def test_spoilt_idx_files_are_refused(tmp_path: Path, spoil: object, message: str) -> None:
    path = write_idx(tmp_path)["train-images"]
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    assert message in refused(tmp_path)


def test_idx_files_come_in_fours(tmp_path: Path) -> None:
    write_idx(tmp_path)["t10k-labels"].unlink()
    assert "no t10k-labels-idx1-ubyte[.gz]" in refused(tmp_path)


def test_empty_idx_files_are_refused(tmp_path: Path) -> None:
    paths = write_idx(tmp_path)
    paths["t10k-images"].write_bytes(idx(TEST[:0]))
    paths["t10k-labels"].write_bytes(idx(TEST_Y[:0]))
    assert "(0, 1, 5, 4): both must be non-empty" in refused(tmp_path)


@pytest.mark.parametrize("label", [12, 200])
def test_labels_beyond_the_images_are_refused(tmp_path: Path, label: int) -> None:
    write_idx(tmp_path)["t10k-labels"].write_bytes(idx(np.full(6, label)))
    assert f"labels from 0 to {label} for 12 images" in refused(tmp_path)


def test_folders_without_data_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "holds nothing" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "is not a folder" in refused(tmp_path / "notes.txt")
    assert "holds 1 other files (notes.txt)" in refused(tmp_path)


def test_two_formats_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    written(tmp_path / "train.parquet")
    assert "both IDX and parquet" in refused(tmp_path)


@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "fine_label"), ("picture", "labels")])
@pytest.mark.parametrize("test", ["test.parquet", "validation-00000-of-00001.parquet"])
def test_parquet_is_read_under_every_column_name(tmp_path: Path, image: str, label: str, test: str) -> None:
    written(tmp_path / "train.parquet", image=image, label=label)
    written(tmp_path / test, COLOUR[::-1], TEST_Y, image=image, label=label)
    before = snapshot(tmp_path)
    got = load("own", tmp_path)
    assert (got.classes, got.train_x.dtype, got.train_y.dtype) == (3, torch.uint8, torch.int64)
    np.testing.assert_array_equal(got.train_x.numpy(), COLOUR.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(got.test_x.numpy(), COLOUR[::-1].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(got.test_y.numpy(), TEST_Y)
    assert got.train_x.is_contiguous() and snapshot(tmp_path) == before


def test_grayscale_and_sharded_parquet_in_order(tmp_path: Path) -> None:
    for i in range(3):
        part = slice(2 * i, 2 * i + 2)
        written(tmp_path / "data" / f"train-0000{i}-of-00003.parquet", TRAIN[part], TRAIN_Y[part])
    written(tmp_path / "data" / "test-00000-of-00001.parquet", TEST, TEST_Y)
    got = load("own", tmp_path)
    np.testing.assert_array_equal(got.train_x.numpy(), TRAIN[:, None])
    np.testing.assert_array_equal(got.train_y.numpy(), TRAIN_Y)
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"2 files train\*.parquet whose names say parts of 3"):
        load("own", tmp_path)


def test_many_images_keep_their_order_through_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CHUNK", 2)
    many = RNG.integers(0, 256, (75, 5, 4), dtype=np.uint8)
    written(tmp_path / "train.parquet", many, np.arange(75) % 3)
    written(tmp_path / "test.parquet", TEST, TEST_Y)
    np.testing.assert_array_equal(load("own", tmp_path).train_x.numpy(), many[:, None])


def test_parquet_without_a_split_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "train.parquet")
    assert "no test or validation*.parquet" in refused(tmp_path)
    path.rename(tmp_path / "test.parquet")
    assert "no train*.parquet" in refused(tmp_path)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (table([png(COLOUR[0])], [1], label="class"), "columns id, img, class: it needs"),
        (pa.table({"img": [1], "label": [1]}), "columns img, label: it needs"),
        (table([png(COLOUR[0]), png(COLOUR[0][:4])], [1, 0]), "(3, 5, 4) in row 0 and (3, 4, 4) in row 1"),
        (table([png(COLOUR[0]), png(TRAIN[0])], [1, 0]), "(3, 5, 4) in row 0 and (1, 5, 4) in row 1"),
        (table([png(COLOUR[0]), png(COLOUR[0])[:-40]], [1, 0]), "in row 1 that are no image"),
        (table([png(COLOUR[0]), b"hello"], [1, 0]), "5 bytes in row 1 that are no image"),
        (table([None], [1]), "no image bytes in row 0"),
        (table([png(TRAIN[0].astype(np.uint16))], [1]), "of mode I;16 in row 0"),
        (table([png(COLOUR[0])] * 2, [None, 1]), "2 rows, 1 of them without a label"),
        (table([], []), "0 rows"),
        (table([png(COLOUR[0])], [-1]), "labels from -1 to 2"),
        (table([png(TRAIN[0])], [1]), "(3, 5, 4) but test images (1, 5, 4)"),
    ],
)
def test_spoilt_parquet_is_refused(tmp_path: Path, spoilt: pa.Table, message: str) -> None:
    written(tmp_path / "train.parquet")
    pq.write_table(spoilt, tmp_path / "test.parquet")
    assert message in refused(tmp_path)


def test_shards_of_two_sizes_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "train-00000-of-00002.parquet")
    written(tmp_path / "train-00001-of-00002.parquet", COLOUR[:, :3])
    written(tmp_path / "test.parquet")
    assert "(3, 3, 4) but train-00000-of-00002.parquet (3, 5, 4)" in refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 200, -5])
def test_truncated_parquet_is_refused(tmp_path: Path, keep: int) -> None:
    path = written(tmp_path / "train.parquet")
    written(tmp_path / "test.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    assert "no sound parquet file" in refused(tmp_path)


def test_names_without_a_folder_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match="pass --data-dir, or install `datasets`"):
        load("cifar10", None)
    with pytest.raises(DataError, match="no data set 'imagenet': choose digits, mnist, fashion-mnist, cifar10"):
        load("imagenet", None)


class FakeSplit:
    def __init__(self, rows: pa.Table) -> None:
        self.rows = rows

    def with_format(self, kind: str) -> FakeSplit:
        assert kind == "arrow"
        return self

    def __getitem__(self, rows: slice) -> pa.Table:
        assert rows == slice(None)
        return self.rows


def test_the_hub_is_asked_where_datasets_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    images = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    blobs, labels = [png(image) for image in images], [i % 3 for i in range(12)]
    splits = {
        "train": FakeSplit(table(blobs[:8], labels[:8], image="image")),
        "test": FakeSplit(table(blobs[8:], labels[8:], image="image")),
    }
    asked = []

    def load_dataset(name: str) -> dict[str, FakeSplit]:
        asked.append(name)
        if name.startswith("zalando"):
            raise RuntimeError("no\nnetwork.")
        return splits

    fake = types.SimpleNamespace(load_dataset=load_dataset, __spec__=object())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    got = load("mnist", None)
    assert asked == ["ylecun/mnist"] and (got.name, got.classes) == ("mnist", 10)
    np.testing.assert_array_equal(got.train_x.numpy(), images[:8, None])
    np.testing.assert_array_equal(got.test_x.numpy(), images[8:, None])
    with pytest.raises(DataError, match=r"did not load from the hub \(no network\): pass --data-dir"):
        load("fashion-mnist", None)


def own(train: torch.Tensor, test: torch.Tensor) -> Data:
    return Data("own", train, torch.zeros(len(train)).long(), test, torch.zeros(len(test)).long(), 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalize_uses_the_training_set_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_PIECE", 4)
    train = torch.from_numpy(COLOUR.transpose(0, 3, 1, 2)).to(dtype)
    test = train.flip(0)[:2] // 2
    kept = train.clone()
    got = normalize(own(train, test))
    mean, std = COLOUR.mean((0, 1, 2)), COLOUR.std((0, 1, 2))
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(got.std, std, rtol=1e-6)
    for x, wanted in ((got.train_x, train), (got.test_x, test)):
        assert x.dtype == torch.float32
        expected = (wanted.double().numpy() - mean[:, None, None]) / std[:, None, None]
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(train, kept)


def test_normalize_only_centres_a_constant_channel() -> None:
    got = normalize(own(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8), torch.full((1, 1, 2, 2), 9.0)))
    assert not got.train_x.any() and (got.test_x == 2).all() and got.std.tolist() == [1.0]


def test_batches_are_a_pure_function_of_seed_and_epoch() -> None:
    torch.manual_seed(0)
    first = [b.tolist() for b in batches(10, 5, seed=3, epoch=7)]
    torch.manual_seed(1)
    assert [b.tolist() for b in batches(10, 5, seed=3, epoch=7)] == first
    assert first == [[9, 5, 3, 2, 1], [0, 6, 8, 7, 4]]
    others = [torch.cat(list(batches(100, 5, seed, epoch))).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in others}) == 16


def test_batches_visit_each_example_once_and_drop_the_partial_one() -> None:
    sizes = {(10, 5): [5, 5], (10, 4): [4, 4], (10, 10): [10], (3, 10): [3], (1, 1): [1]}
    for (n, batch), wanted in sizes.items():
        got = list(batches(n, batch, 0, 0))
        assert [len(b) for b in got] == wanted and {b.dtype for b in got} == {torch.int64}
        seen = torch.cat(got)
        assert len(seen.unique()) == len(seen) and 0 <= seen.min() and seen.max() < n


@pytest.mark.parametrize("bad", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_batches_refuse_at_the_call(bad: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        batches(*bad)


def crops(image: torch.Tensor, pad: int) -> list[torch.Tensor]:
    padded = torch.nn.functional.pad(image, (pad,) * 4)
    _, h, w = image.shape
    return [padded[:, top : top + h, left : left + w] for top in range(2 * pad + 1) for left in range(2 * pad + 1)]


@pytest.mark.parametrize(("pad", "flip"), [(2, True), (2, False), (0, True)])
def test_augment_gives_every_crop_and_mirror_and_nothing_else(pad: int, flip: bool) -> None:
    image = torch.arange(1.0, 41.0).reshape(2, 5, 4)
    possible = {tuple(crop.flatten().tolist()) for crop in crops(image, pad)}
    if flip:
        possible |= {tuple(crop.flip(2).flatten().tolist()) for crop in crops(image, pad)}
    got = augment(image.expand(1500, 2, 5, 4), torch.Generator().manual_seed(0), pad, flip)
    assert {tuple(x.flatten().tolist()) for x in got} == possible


def test_augment_keeps_images_apart_and_repeats_with_its_generator() -> None:
    x = torch.arange(1.0, 5.0)[:, None, None, None].expand(4, 3, 8, 8).clone()
    kept = x.clone()
    got = augment(x, torch.Generator().manual_seed(0), 2, True)
    assert all(set(image.unique().tolist()) <= {0.0, i} for i, image in enumerate(got, start=1))
    assert torch.equal(got, augment(x, torch.Generator().manual_seed(0), 2, True)) and torch.equal(x, kept)
    assert augment(x, torch.Generator(), 0, False) is x


@pytest.mark.parametrize(("shape", "pad"), [((3, 8, 8), 1), ((1, 3, 8, 8), -1)])
def test_augment_refuses(shape: tuple[int, ...], pad: int) -> None:
    with pytest.raises(ValueError, match="augment needs"):
        augment(torch.zeros(shape), torch.Generator(), pad, False)
