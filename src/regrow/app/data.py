"""Image data sets for the command line: read, checked, normalised, batched, augmented; never written."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from regrow.core.text import by

Split = tuple[Tensor, Tensor]

_DIGITS_TEST = 360
_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UBYTE = 8
_LABEL_COLUMNS = ("label", "fine_label", "labels")
_GRAY_MODES = ("1", "L")
_COLOUR_MODES = ("RGB", "RGBA", "P")
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_CHUNK = 512
_PIECE = 4096
_LONGEST_REASON = 160
_FEWEST_CLASSES = 2


class DataError(ValueError):
    """Data that cannot be used: the message names the path, the numbers and the way out."""


class Data(NamedTuple):
    """Training and test images with their labels.

    ``train_x`` (n, c, h, w) and ``test_x`` (m, c, h, w) are uint8 or float32, as stored; ``train_y`` (n,) and
    ``test_y`` (m,) are int64 in ``0 .. classes - 1``.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


class Normalized(NamedTuple):
    """Float32 images of zero mean and unit variance per channel, and the training set's statistics.

    ``train_x`` (n, c, h, w), ``test_x`` (m, c, h, w), ``mean`` (c,) and ``std`` (c,), the last two in the
    units of the images before normalisation.
    """

    train_x: Tensor
    test_x: Tensor
    mean: Tensor
    std: Tensor


class _Known(NamedTuple):
    hub: str
    shape: tuple[int, int, int]
    classes: int


_KNOWN = {
    "mnist": _Known("ylecun/mnist", (1, 28, 28), 10),
    "fashion-mnist": _Known("zalando-datasets/fashion_mnist", (1, 28, 28), 10),
    "cifar10": _Known("uoft-cs/cifar10", (3, 32, 32), 10),
    "cifar100": _Known("uoft-cs/cifar100", (3, 32, 32), 100),
}


def load(name: str, data_dir: Path | None = None) -> Data:
    """Load a data set by name, or whatever IDX or parquet files lie in ``data_dir``.

    ``digits`` (1,797 images of 8 x 8 in 10 classes, split 1,437 / 360) comes with scikit-learn. With
    ``data_dir`` the files decide, and ``name`` is what the result is called: the folder's own name stands for
    the default ``digits``, and a known name whose images have another shape is an error. Without it,
    ``mnist``, ``fashion-mnist``, ``cifar10`` and ``cifar100`` come from the Hugging Face hub, if ``datasets``
    is installed.

    Returns images (n, c, h, w), uint8 in 0 .. 255 (float32 in 0 .. 16 for ``digits``), and int64 labels (n,).

    Raises DataError for an unknown name and for data that is missing, truncated, corrupt or inconsistent.

    >>> data = load("digits")
    >>> data.train_x.shape, data.test_x.shape, data.classes
    (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]), 10)
    """
    if data_dir is not None:
        folder = Path(data_dir)
        train, test = _from_folder(folder)
        label = folder.resolve().name if name == "digits" else name
        return _checked(label, str(folder), train, test)
    if name == "digits":
        return _digits()
    if name in _KNOWN:
        return _checked(name, f"the hub's {_KNOWN[name].hub}", *_from_hub(name))
    choices = ", ".join(("digits", *_KNOWN))
    raise DataError(f"there is no data set {name!r}: choose {choices}, or pass --data-dir with your own files.")


def normalize(data: Data) -> Normalized:
    """Scale both sets by the per-channel mean and standard deviation of the training images.

    Takes images (n, c, h, w) and (m, c, h, w) of any real dtype; returns them as new float32 tensors with the
    statistics, float32 (c,). A constant channel is only centred: its ``std`` is given as 1.

    Raises nothing for data that ``load`` returned.

    >>> scaled = normalize(load("digits"))
    >>> scaled.train_x.mean().abs().item() < 1e-5, scaled.mean.shape
    (True, torch.Size([1]))
    """
    mean, std = _statistics(data.train_x)
    shift, scale = mean.float()[:, None, None], std.float()[:, None, None]
    scaled = [x.to(torch.float32, copy=True).sub_(shift).div_(scale) for x in (data.train_x, data.test_x)]
    return Normalized(scaled[0], scaled[1], mean.float(), std.float())


def batches(n: int, batch: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Give the shuffled index batches of one epoch, a pure function of ``(seed, epoch)``.

    Each is int64 (batch,), indices in ``0 .. n - 1``. The last partial batch is dropped where ``n >= batch``;
    with fewer examples than that, all ``n`` make one batch. A resumed run sees the same order, also under
    another version of torch or numpy.

    Raises ValueError unless ``n`` and ``batch`` are at least 1 and ``seed`` and ``epoch`` at least 0.

    >>> [indices.shape[0] for indices in batches(10, 4, seed=0, epoch=0)]
    [4, 4]
    """
    if n < 1 or batch < 1:
        raise ValueError(f"batches need n and batch of at least 1, not n={n} and batch={batch}.")
    if seed < 0 or epoch < 0:
        raise ValueError(f"batches need seed and epoch of at least 0, not seed={seed} and epoch={epoch}.")
    # The raw bits of a bit generator are the same in every numpy version; permutations are not, nor torch's.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
    order = torch.from_numpy(np.argsort(bits, kind="stable").astype(np.int64))
    size = min(batch, n)
    return iter(torch.split(order[: n // size * size], size))


def augment(x: Tensor, generator: torch.Generator, pad: int, flip: bool) -> Tensor:
    """Crop each image at random from its zero-padded self, and mirror half of them left to right.

    Takes normalised images (n, c, h, w), so that zero is the mean colour, and returns as many of the same
    shape, dtype and device: a new tensor, or ``x`` itself when ``pad`` is 0 and ``flip`` is false. ``pad`` is
    in pixels per side. Random numbers are drawn on the generator's device.

    Raises ValueError when ``x`` is not of four dimensions or ``pad`` is negative.

    >>> augment(torch.ones(2, 3, 8, 8), torch.Generator().manual_seed(0), pad=1, flip=True).shape
    torch.Size([2, 3, 8, 8])
    """
    if x.dim() != len("nchw") or pad < 0:
        shape = tuple(x.shape)
        raise ValueError(f"augment needs images (n, c, h, w) and a pad from 0 on, not {shape} and pad {pad}.")
    n, _, h, w = x.shape
    device = generator.device
    if pad:
        top, left = torch.randint(2 * pad + 1, (2, n), generator=generator, device=device).to(x.device)
        windows = torch.nn.functional.pad(x, (pad, pad, pad, pad)).unfold(2, h, 1).unfold(3, w, 1)
        x = windows[torch.arange(n, device=x.device), :, top, left]
    if flip:
        mirrored = torch.rand(n, generator=generator, device=device).lt(0.5).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, float64 (c,), of images (n, c, h, w)."""
    count = x.numel() // x.shape[1]
    mean = square = torch.zeros(x.shape[1], dtype=torch.float64)
    # In pieces: a float64 copy of all images would be eight times the size of the bytes.
    for part in torch.split(x, _PIECE):
        mean = mean + part.double().sum((0, 2, 3)) / count
    for part in torch.split(x, _PIECE):
        square = square + (part.double() - mean[:, None, None]).square().sum((0, 2, 3))
    std = (square / count).sqrt()
    return mean, torch.where(std > 0, std, torch.ones_like(std))


def _checked(name: str, where: str, train: Split, test: Split) -> Data:
    """Make a Data of two splits that each have as many labels as images."""
    (train_x, train_y), (test_x, test_y) = train, test
    if 0 in train_x.shape or 0 in test_x.shape:
        shapes = f"{tuple(train_x.shape)} and {tuple(test_x.shape)}"
        raise DataError(f"{where} holds training and test images of shapes {shapes}: both must be non-empty.")
    shape, test_shape = tuple(train_x.shape[1:]), tuple(test_x.shape[1:])
    if shape != test_shape:
        raise DataError(
            f"{where} holds training images (c, h, w) = {shape} but test images {test_shape}: make one size."
        )
    labels = torch.cat((train_y, test_y))
    lowest, classes = int(labels.min()), int(labels.max()) + 1
    if lowest < 0 or not _FEWEST_CLASSES <= classes <= len(labels):
        raise DataError(
            f"{where} holds labels from {lowest} to {classes - 1} for {len(labels)} images: "
            f"they must number at least two classes from 0 on."
        )
    known = _KNOWN.get(name)
    if known is not None and (known.shape != shape or classes > known.classes):
        raise DataError(
            f"{where} holds images {shape} in {classes} classes, {name} {known.shape} in {known.classes}: "
            f"give the data its own name, or another --data-dir."
        )
    return Data(name, train_x, train_y, test_x, test_y, classes if known is None else known.classes)


def _digits() -> Data:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=_DIGITS_TEST, stratify=labels, random_state=0)
    train_x, test_x = (torch.from_numpy(x).float().reshape(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = (torch.from_numpy(y).long() for y in split[2:])
    return Data("digits", train_x, train_y, test_x, test_y, 10)


def _from_hub(name: str) -> tuple[Split, Split]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{name} is not on this machine: pass --data-dir, or install `datasets` to load it.")
    datasets = importlib.import_module("datasets")
    hub = _KNOWN[name].hub
    try:
        splits = datasets.load_dataset(hub)
        tables = [splits[part].with_format("arrow")[:] for part in ("train", "test")]
    except Exception as error:  # which errors the hub's client raises differs between its versions
        reason = _one_line(error)
        raise DataError(f"{hub} did not load from the hub ({reason}): pass --data-dir instead.") from error
    train, test = (_table_split(table, f"the hub's {hub}") for table in tables)
    return train, test


def _from_folder(folder: Path) -> tuple[Split, Split]:
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {state}: pass the folder that holds the IDX or parquet files.")
    idx = any(_idx_path(folder, part, kind) for part in ("train", "t10k") for kind in ("images", "labels"))
    parquet = {part: _parquet_paths(folder, part) for part in ("train", "test", "validation")}
    if idx and any(parquet.values()):
        raise DataError(f"{folder} holds both IDX and parquet files: move one of the two elsewhere.")
    if idx:
        return _idx_split(folder, "train"), _idx_split(folder, "t10k")
    if any(parquet.values()):
        test = parquet["test"] or parquet["validation"]
        if not parquet["train"] or not test:
            missing = "train" if test else "test or validation"
            raise DataError(f"{folder} holds parquet files but no {missing}*.parquet: add that split.")
        return _parquet_split(parquet["train"]), _parquet_split(test)
    names = sorted(path.name for path in folder.iterdir())
    seen = f"{len(names)} other files ({', '.join(names[:3])}{', ...' * (len(names) > len(names[:3]))})"
    raise DataError(
        f"{folder} holds {seen if names else 'nothing'}: it should hold train-images-idx3-ubyte[.gz] and its "
        f"three companions, or train*.parquet and test*.parquet."
    )


def _idx_path(folder: Path, part: str, kind: str) -> Path | None:
    rank = 3 if kind == "images" else 1
    names = (f"{part}-{kind}{mark}idx{rank}-ubyte{end}" for end in ("", ".gz") for mark in "-.")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx_split(folder: Path, part: str) -> Split:
    found = []
    for kind, rank in (("images", 3), ("labels", 1)):
        path = _idx_path(folder, part, kind)
        if path is None:
            raise DataError(f"{folder} has IDX files but no {part}-{kind}-idx{rank}-ubyte[.gz]: add it.")
        found.append((path, _read_idx(path, rank)))
    (image_path, images), (label_path, labels) = found
    if len(images) != len(labels):
        raise DataError(
            f"{image_path} holds {len(images)} images but {label_path.name} {len(labels)} labels: "
            f"give the two files of one data set."
        )
    return images[:, None], labels.long()


def _read_idx(path: Path, rank: int) -> Tensor:
    """The uint8 tensor of ``rank`` dimensions in an IDX file, gzipped or not (whatever its name says)."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(_GZIP_MAGIC) else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({_one_line(error)}): download it again.") from error
    magic, start = bytes((0, 0, _IDX_UBYTE, rank)), 4 + 4 * rank
    if len(raw) < start or not raw.startswith(magic):
        raise DataError(
            f"{path} has {len(raw)} bytes that begin with 0x{raw[:4].hex()}, not with the 0x{magic.hex()} "
            f"of IDX bytes in {rank} dimensions: download it again."
        )
    dims = struct.unpack(f">{rank}I", raw[4:start])
    if math.prod(dims) != len(raw) - start:
        raise DataError(
            f"{path} declares {by(dims)} = {math.prod(dims)} bytes but holds {len(raw) - start}: download it again."
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(dims).copy())


def _parquet_paths(folder: Path, part: str) -> list[Path]:
    """All files of one split, in order; those in the folder itself count before those in its ``data``."""
    paths = sorted(folder.glob(f"{part}*.parquet")) or sorted((folder / "data").glob(f"{part}*.parquet"))
    shards = [re.search(r"-(\d+)-of-(\d+)\.parquet$", path.name) for path in paths]
    totals = {int(shard[2]) for shard in shards if shard}
    if totals and (totals != {len(paths)} or None in shards):
        wanted = " and of ".join(map(str, sorted(totals)))
        raise DataError(
            f"{paths[0].parent} holds {len(paths)} files {part}*.parquet whose names say parts of {wanted}: "
            f"leave all parts of one set there and nothing else."
        )
    return paths


def _parquet_split(paths: Sequence[Path]) -> Split:
    splits = [_read_parquet(path) for path in paths]
    for path, (x, _) in zip(paths, splits, strict=True):
        if x.shape[1:] != splits[0][0].shape[1:]:
            first, other = tuple(splits[0][0].shape[1:]), tuple(x.shape[1:])
            raise DataError(f"{path} holds images (c, h, w) = {other} but {paths[0].name} {first}: make all one size.")
    if len(splits) == 1:
        return splits[0]
    return torch.cat([x for x, _ in splits]), torch.cat([y for _, y in splits])


def _read_parquet(path: Path) -> Split:
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow, str(path))
            table = file.read(columns=list(columns))
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is no sound parquet file ({_one_line(error)}): download it again.") from error
    return _table_split(table, str(path))


def _columns(schema: Any, where: str) -> tuple[str, str]:
    """Names of the image and the label column of an arrow schema."""
    images = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    integers = [f.name for f in schema if pa.types.is_integer(f.type)]
    labels = [name for name in _LABEL_COLUMNS if name in integers]
    if len(images) != 1 or not labels:
        raise DataError(
            f"{where} has the columns {', '.join(schema.names) or '(none)'}: it needs exactly one image "
            f"column, a struct with bytes, and an integer column {' or '.join(_LABEL_COLUMNS)}."
        )
    return images[0], labels[0]


def _table_split(table: Any, where: str) -> Split:
    image, label = _columns(table.schema, where)
    labels = table.column(label)
    if not len(labels) or labels.null_count:
        raise DataError(
            f"{where} has {len(labels)} rows, {labels.null_count} of them without a label: "
            f"it needs at least one row, and a label in each."
        )
    images = _decode(pc.struct_field(table.column(image), "bytes").to_pylist(), where)
    return images, torch.from_numpy(labels.to_numpy().astype(np.int64))


def _decode(blobs: Sequence[bytes | None], where: str) -> Tensor:
    """Images (n, c, h, w), uint8, of encoded ones; in threads, as PIL decodes outside the global lock."""
    first = _pixels(blobs[0], where, 0)
    out = np.empty((len(blobs), *first.shape), np.uint8)

    def fill(start: int) -> None:
        for row in range(start, min(start + _CHUNK, len(blobs))):
            pixels = _pixels(blobs[row], where, row)
            if pixels.shape != first.shape:
                raise DataError(
                    f"{where} has images (c, h, w) = {first.shape} in row 0 and {pixels.shape} in row {row}: "
                    f"make all images one size and colour mode."
                )
            out[row] = pixels

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(0, len(blobs), _CHUNK)):
            pass
    return torch.from_numpy(out)


def _pixels(blob: bytes | None, where: str, row: int) -> npt.NDArray[np.uint8]:
    """One decoded image (c, h, w)."""
    if blob is None:
        raise DataError(f"{where} has no image bytes in row {row}: embed the images in the file.")
    try:
        with Image.open(BytesIO(blob)) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("L" if mode in _GRAY_MODES else "RGB"))
    except _UNDECODABLE as error:
        raise DataError(
            f"{where} has {len(blob)} bytes in row {row} that are no image ({_one_line(error)}): remove it."
        ) from error
    if mode not in _GRAY_MODES + _COLOUR_MODES:
        raise DataError(f"{where} has an image of mode {mode} in row {row}: make it 8-bit grayscale or RGB.")
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)


def _one_line(error: BaseException) -> str:
    """An error's message cut to stand inside a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".") if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
