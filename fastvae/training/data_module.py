"""The base of all data modules: splits, batches and preprocessing."""

import copy
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from fastvae._extras import extra
from fastvae._types import check_choice
from fastvae.models.semi_supervised import UNLABELLED
from fastvae.training.errors import DataError
from fastvae.training.preprocessing import Binarization, Preprocessing, Scaling
from fastvae.training.sources import InMemory, Source, as_it_is
from fastvae.training.splits import Indices, ResumableSampler, split, stratified_order

with extra("train"):
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

Part = Literal["train", "val", "test"]


class AutoencoderData(LightningDataModule):
    """Batches for training, validation and test from one data set. A subclass says in :meth:`load` what that is.

    A batch is a mapping of ``x``, ``index`` and, where there are labels, ``label``. 8-bit images stay 8-bit up to the loss.

    Args:
        batch_size: samples a process and batch.
        val: share of the samples for validation.
        test: share of the samples for the test, where the data set has no test part of its own.
        seed: of the split, the order of the training samples and static binarisation.
        workers: processes that read ahead; 0 reads in the training's own, which is faster for data in memory.
        binarize: ``"static"`` draws each pixel as 0 or 1 once, ``"dynamic"`` each time it is seen; for 8-bit images.
        scaling: ``"min_max"`` or ``"z_score"`` by the statistics of the training part; for data in memory.
        labelled: number of training samples that keep their label, equally many of each class as far as it goes; the label of the others
            is -1. All of them keep it by default.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        val: float = 0.1,
        test: float = 0.2,
        seed: int = 0,
        workers: int = 0,
        binarize: Binarization = "none",
        scaling: Scaling = "none",
        labelled: int | None = None,
    ):
        super().__init__()
        # The arguments of the subclass, so that a checkpoint's data can be made again. A checkpoint holds no paths.
        self.save_hyperparameters(logger=False)
        self.hparams.update({name: str(value) for name, value in self.hparams.items() if isinstance(value, Path)})
        check_choice("binarize", binarize, get_args(Binarization))
        check_choice("scaling", scaling, get_args(Scaling))
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, takes an integer >= 1")
        if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
            raise ValueError(f"val, test: got {val}, {test}, takes shares in [0, 1) that are less than 1 together")
        self.batch_size, self.val, self.test, self.seed, self.workers = batch_size, val, test, seed, workers
        if labelled is not None and labelled < 0:
            raise ValueError(f"labelled: got {labelled}, takes an integer >= 0")
        self.binarize, self.scaling, self.labelled = binarize, scaling, labelled
        self.source: Source | None = None
        self.test_source: Source | None = None
        self.indices = Indices(*torch.empty(3, 0, dtype=torch.int64))
        self.broken: set[str] = set()
        self._begin_at = 0, 0

    def load(self) -> tuple[Source, Source | None]:
        """The data set, and its own test part where it has one."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.source is not None:
            return
        source, test_source = self.load()
        order = stratified_order(len(source), source.labels, self.seed)
        self.indices = split(order, self.val, 0.0 if test_source is not None else self.test)
        if len(self.indices.train) == 0:
            raise DataError(f"{type(self).__name__}: got {len(source)} samples, takes at least one for training")
        if self.labelled is not None:
            source = self._with_hidden_labels(source, self.labelled)
        if self.binarize == "static":
            source = source.binarized(self.seed)
            test_source = None if test_source is None else test_source.binarized(self.seed)
        self.source, self.test_source = source, test_source

    def _with_hidden_labels(self, source: Source, labelled: int) -> Source:
        """The source without the labels of all training samples but the first, among which the classes are equally frequent."""
        if source.labels is None or labelled > len(self.indices.train):
            have = "have no labels" if source.labels is None else f"have {len(self.indices.train)} samples for training"
            raise DataError(f"labelled: got {labelled}, but the data of {type(self).__name__} {have}")
        hidden = copy.copy(source)
        hidden.labels = source.labels.index_fill(0, self.indices.train[labelled:], UNLABELLED)
        return hidden

    def make_preprocessing(self) -> Preprocessing:
        """Makes what each batch goes through on the device, fitted to the training part."""
        preprocessing = Preprocessing(self.binarize == "dynamic", self.scaling)
        if self.scaling != "none":
            if not isinstance(self.source, InMemory):
                raise DataError(f"scaling: got {self.scaling!r} for files, takes data in memory or 'none'")
            preprocessing.fit(self.source.x[self.indices.train])
        return preprocessing

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        replicas, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        sampler = ResumableSampler(len(self.indices.train), self.seed, num_replicas=replicas, rank=rank)
        epoch, batches = self._begin_at
        sampler.begin_at(epoch, batches * self.batch_size)
        return self._loader(self._part(self.indices.train), sampler=sampler)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self._part(self.indices.val)) if len(self.indices.val) else []

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_part())

    def whole_dataloader(self) -> DataLoader:
        """The whole data set in its own order, without a test part that is a data set of its own."""
        return self._loader(self.source)

    def samples(self, part: Part, count: int | None = None) -> dict[str, Any]:
        """The first samples of a part as one batch, before preprocessing. Loads the data set where that has not been done.

        Args:
            part: ``"train"``, ``"val"`` or ``"test"``.
            count: number of samples; all of them by default, and where the part has fewer.
        """
        check_choice("part", part, get_args(Part))
        self.setup()
        chosen: Any = self.test_part() if part == "test" else self._part(getattr(self.indices, part))
        return chosen.__getitems__(list(range(len(chosen)))[:count])

    def test_part(self) -> Any:
        """The test samples, as a data set whose batches are made by ``__getitems__``."""
        return self._part(self.indices.test) if self.test_source is None else self.test_source

    def _part(self, indices: Tensor) -> Subset:
        assert self.source is not None, "setup() comes first"
        return Subset(self.source, indices.tolist())

    def _loader(self, part: Any, sampler: ResumableSampler | None = None) -> DataLoader:
        return DataLoader(
            part,
            self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
            # The base seed of the workers comes from here, and not from the generator that draws the network's noise.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        for message in batch.pop("broken", ()):
            if message not in self.broken:
                self.broken.add(message)
                rank_zero_warn(f"skipped {message} ({len(self.broken)} broken so far)")
        return batch

    def teardown(self, stage: str) -> None:
        if self.broken:
            rank_zero_info(f"{type(self).__name__}: skipped {len(self.broken)} broken images")

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the batch with which a training that is resumed goes on."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        # Lightning declares the type of a tracker that has fewer counts.
        epochs: Any = loop.epoch_progress.current
        batches = loop.epoch_loop.batch_progress.current.ready
        if epochs.processed == epochs.started or batches >= self.trainer.num_training_batches:
            return {"epoch": max(epochs.processed, epochs.started), "batches": 0}
        return {"epoch": epochs.processed, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._begin_at = state_dict["epoch"], state_dict["batches"]
