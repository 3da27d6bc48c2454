"""Images for classification: Fashion-MNIST's files, scikit-learn's digits, or a folder of folders
such as ImageNet-1K, with timm's transforms, mixup and label smoothing.

    training    {"images": float32 [B, 3, S, S], "labels": float32 [B, C]}, labels as probabilities
    val         {"images", "labels": int64 [B]}; filler has label -100 and only zeros
    both        "skipped": int64 [B], the number of unreadable images that each sample replaces

Order and resuming are those of text: the position determines the sample (`positioned.py`). Random
crops, colours and erased parts depend on the seed and the position, random mixing on the position
of the batch's first sample, so the number of workers or an interruption changes nothing. Mixing
pairs the images of one rank's batch: with it, and only with it, the number of ranks changes what is
trained on.

A data set that is missing is an error that says how to get it. No other is used in its place.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import track
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from scmoe.datamodules.image_sets import Images, ImageSplits, UnreadableImage
from scmoe.datamodules.positioned import IGNORE, PositionedDataModule, SampleOrder

Augment = Literal["none", "imagenet"]


# ---------------------------------------------------------------------- transforms and batches


def train_transform(size: int, augment: Augment) -> Callable[..., Tensor]:
    """Return the transform of `augment`: none (the largest square in the middle of the image), or
    crop, flip, RandAugment and erasing as for Swin."""
    if augment == "none":
        return eval_transform(size, augment)
    return create_transform(
        size,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        interpolation="bicubic",
    )


def eval_transform(size: int, augment: Augment) -> Callable[..., Tensor]:
    """Return the transform of an image that is not trained on. imagenet: its centre."""
    crop_pct = 0.9 if augment == "imagenet" else 1.0
    return create_transform(size, interpolation="bicubic", crop_pct=crop_pct)


@dataclass(eq=False)
class TrainImages(Dataset):
    """Item p is the sample at position p of the whole training, transformed at random from
    (seed, p).

    skip: the next image takes the place of one that cannot be read; `skipped` counts such images.
    """

    images: Images
    order: SampleOrder
    transform: Callable[..., Tensor]
    skip: bool = False

    def __getitem__(self, position: int) -> dict[str, Any]:
        i = int(self.order(np.array([position]))[0])
        skipped = 0
        while True:
            try:
                picture, label = self.images[(i + skipped) % len(self.images)]
                break
            except UnreadableImage:
                skipped += 1
                if not self.skip or skipped == len(self.images):
                    raise
        with drawn_from(self.order.seed, position):
            return {
                "images": self.transform(picture),
                "labels": label,
                "position": position,
                "skipped": skipped,
            }


class EvalImages(Dataset):
    """The images in order, or `limit` of them evenly spread. Items after the last one are filler.

    skip: filler takes the place of an image that cannot be read; `skipped` counts it.
    """

    def __init__(
        self,
        images: Images,
        transform: Callable[..., Tensor],
        limit: int | None,
        size: int,
        skip: bool = False,
    ) -> None:
        self.images = images
        self.transform = transform
        self.size = size
        self.skip = skip
        self.limit = len(images) if limit is None else min(limit, len(images))

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, i: int) -> dict[str, Any]:
        filler = {"images": torch.zeros(3, self.size, self.size), "labels": IGNORE, "skipped": 0}
        if i >= self.limit:
            return filler
        try:
            picture, label = self.images[i * len(self.images) // self.limit]
        except UnreadableImage:
            if not self.skip:
                raise
            return filler | {"skipped": 1}
        return {"images": self.transform(picture), "labels": label, "skipped": 0}


class MixingCollate:
    """Collate training samples: labels become smoothed probabilities, and images are mixed if
    mixup or cutmix is set."""

    def __init__(
        self, num_classes: int, smoothing: float, mixup: float, cutmix: float, seed: int
    ) -> None:
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.seed = seed
        self.mix: Mixup | None = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = default_collate(list(samples))
        images, labels = batch["images"], batch["labels"]
        if self.mix is None:
            labels = mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        else:
            with drawn_from(self.seed, samples[0]["position"]):
                images, labels = self.mix(images, labels)
        return {"images": images, "labels": labels, "skipped": batch["skipped"]}


@contextmanager
def drawn_from(seed: int, position: int) -> Iterator[None]:
    """Seed the three global generators from (seed, position) for timm, and restore them on exit."""
    fresh = int(np.random.SeedSequence([seed, position]).generate_state(1)[0])
    with isolate_rng(include_cuda=False):
        random.seed(fresh)
        np.random.seed(fresh)
        torch.default_generator.manual_seed(fresh)  # torch.manual_seed would also seed the devices
        yield


# ---------------------------------------------------------------------- the datamodule


class ImageDataModule(PositionedDataModule):
    """A data module whose samples are the images of `splits`.

    val_images: images that a validation uses; None: all.
    """

    def __init__(
        self,
        splits: ImageSplits,
        *,
        image_size: int,
        num_classes: int,
        augment: Augment = "none",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        val_images: int | None = None,
        skip: bool = False,
        **position: Any,
    ) -> None:
        super().__init__(**position)
        if num_classes != splits.num_classes:
            raise ValueError(
                f"data.num_classes is {num_classes}, allowed: {splits.num_classes}, as in the data"
            )
        self.name = splits.name
        self.splits = splits
        self.train_transform = train_transform(image_size, augment)
        self.eval_transform = eval_transform(image_size, augment)
        self.batch = MixingCollate(num_classes, label_smoothing, mixup, cutmix, self.seed)
        self.val_images = val_images
        self.image_size = image_size
        self.skip = skip

    def identity(self) -> dict[str, Any]:
        return {"data": self.splits.content, "seed": self.seed}

    def train_dataloader(self) -> DataLoader:
        images = self.splits.images["train"]
        order = SampleOrder(len(images), self.seed)
        dataset = TrainImages(images, order, self.train_transform, self.skip)
        return self.train_loader(dataset, np.asarray, self.batch)  # its items are positions

    def val_dataloader(self) -> DataLoader:
        return self.held_out_loader(self.val_images)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of all validation images: these data sets have two splits."""
        return self.held_out_loader(None)

    def held_out_loader(self, limit: int | None) -> DataLoader:
        images = EvalImages(
            self.splits.images["val"], self.eval_transform, limit, self.image_size, self.skip
        )
        return self.eval_loader(images)

    def unreadable(self) -> list[str]:
        problems = []
        for split, images in self.splits.images.items():
            for i in track(range(len(images)), f"reading {split}", console=Console(stderr=True)):
                try:
                    images[i]
                except UnreadableImage as error:
                    problems.append(str(error))
        return problems
