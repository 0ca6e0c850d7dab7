"""The blends of a recipe as megatron-core's datasets, whose sample indices lie in a checked cache."""

import importlib.metadata
import json
import platform
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from dsmoe_megatron.batch_ramp import samples_of_steps
from dsmoe_megatron.config import Config, DatasetSource
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import Tokenizer
from dsmoe_megatron.training.index_cache import IndexCache, Say


@dataclass(frozen=True)
class DatasetTokenizer:
    """What megatron-core's datasets ask of a tokenizer.

    Attributes:
        vocab_size: tokens.
        eod: end-of-document id.
        pad: an id that is in no document, so that nothing is masked.
        unique_identifiers: part of the name of the cached sample indices.
    """

    vocab_size: int
    eod: int
    unique_identifiers: OrderedDict[str, object]
    pad: int = -1


@dataclass(frozen=True)
class DatasetUse:
    """What a run reads of one dataset.

    Attributes:
        prefix: of the dataset.
        samples: that the run draws from it.
        epochs: passes over it that they are.
    """

    prefix: str
    samples: int
    epochs: float


class _UnsynchronisedBuilder(BlendedMegatronDatasetBuilder):
    """megatron-core's builder without its barriers between rank 0 and the others.

    Rank 0 has made all indices before any rank opens them, so there is nothing to wait for; and a fault of rank 0
    between two barriers would leave the others waiting for the timeout.
    """

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list[Any], sizes_per_dataset: list[Any]
    ) -> list[list[Any]]:
        datasets = [
            self._build_megatron_dataset_splits(prefix, split, sizes)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(of_split) for of_split in zip(*datasets, strict=True)]

    @staticmethod
    def build_generic_dataset(cls: Any, _is_built_on_rank: Any, _synchronize_ranks: bool, *arguments: Any) -> Any:
        return cls(*arguments)


@dataclass(frozen=True)
class Blend:
    """Datasets that are drawn from together.

    Attributes:
        split: train or valid.
        sources: the datasets and their weights.
        samples: to draw.
        config: sequence length, seed, and whether documents are kept apart.
        tokenizer: that the data was made with.
        cache_dir: folder of the sample indices.
    """

    split: Split
    sources: Sequence[DatasetSource]
    samples: int
    config: Config
    tokenizer: DatasetTokenizer
    cache_dir: Path

    @property
    def cache(self) -> IndexCache:
        """The indices of these datasets as they are now: made from other content, they have another name."""
        manifests = [Path(f"{source.prefix}.manifest.json").read_bytes() for source in self.sources]
        inputs = {
            "datasets": [
                [source.prefix, source.weight, json.loads(manifest)["files"]["idx"]["sha256"]]
                for source, manifest in zip(self.sources, manifests, strict=True)
            ],
            "samples": self.samples,
            "sequence_length": self.config.train.sequence_length,
            "seed": self.config.train.seed,
            "tokenizer": self.tokenizer.unique_identifiers,
            "megatron-core": importlib.metadata.version("megatron-core"),
        }
        return IndexCache(self.cache_dir, self.split.name, inputs)

    def make_indices(self, say: Say) -> Any | None:
        """Make the sample indices unless they are there and whole; on rank 0 alone.

        Returns:
            The dataset over indices that were built; None where there was nothing to build.

        Raises:
            DataError: the cache folder cannot be written.
        """
        return self.cache.make(self._dataset, say)

    def open(self) -> Any:
        """The dataset over indices that make_indices has left.

        Raises:
            DataError: they are not there.
        """
        folder = self.cache.folder
        if not folder.is_dir():
            raise DataError(
                f"{folder}: rank 0 has made these sample indices, and they are not there on {platform.node()}: "
                "set data.cache_dir to a folder that all nodes share"
            )
        return self._dataset(folder)

    def uses(self) -> list[DatasetUse]:
        """What the run reads of each dataset."""
        blended = self.open()
        datasets = getattr(blended, "datasets", [blended])
        drawn = [self.samples]
        if len(datasets) > 1:
            # megatron-core draws a few samples more than the run reads
            drawn = np.bincount(blended.dataset_index[: self.samples], minlength=len(datasets)).tolist()
        length = self.config.train.sequence_length
        return [
            DatasetUse(source.prefix, samples, samples * length / int(dataset.dataset.sequence_lengths.sum()))
            for source, samples, dataset in zip(self.sources, drawn, datasets, strict=True)
        ]

    def request(self, folder: Path) -> tuple[list[int], GPTDatasetConfig]:
        """What megatron-core's builder is asked for.

        Args:
            folder: of the sample indices.

        Returns:
            Samples of each split, and the datasets' configuration.
        """
        blends: list[Any] = [None] * len(Split)
        sizes = [0] * len(Split)
        # a single dataset without a weight is read as it is, without a blending index
        weights = [source.weight for source in self.sources] if len(self.sources) > 1 else None
        blends[self.split.value] = ([source.prefix for source in self.sources], weights)
        sizes[self.split.value] = self.samples
        return sizes, GPTDatasetConfig(
            random_seed=self.config.train.seed,
            sequence_length=self.config.train.sequence_length,
            blend_per_split=blends,
            tokenizer=self.tokenizer,
            path_to_cache=str(folder),
            reset_position_ids=self.config.data.separate_documents,
            reset_attention_mask=False,
            # what follows a document says nothing of it: its last token predicts nothing
            eod_mask_loss=self.config.data.separate_documents,
            create_attention_mask=False,
        )

    def _dataset(self, folder: Path) -> Any:
        """The dataset; indices that `folder` does not have are built and written there."""
        sizes, request = self.request(folder)
        return _UnsynchronisedBuilder(GPTDataset, sizes, _on_every_rank, request).build()[self.split.value]


def _on_every_rank() -> bool:
    return True


def cache_dir_of(config: Config) -> Path:
    """The folder of the sample indices: data.cache_dir, or the run's own."""
    return Path(config.data.cache_dir) if config.data.cache_dir else Path(config.train.run_dir) / "cache"


def blends_of(config: Config, tokenizer: Tokenizer, cache_dir: Path, train_samples: int | None = None) -> list[Blend]:
    """The training blend, and the validation blend if the recipe has one.

    Args:
        config: checked recipe; the validation blend covers evaluation.batches.
        tokenizer: that the data was made with.
        cache_dir: folder of the sample indices.
        train_samples: that the training blend covers; None: train.steps of train.global_batch_size.
    """
    train = config.train
    samples = samples_of_steps(train, train.steps) if train_samples is None else train_samples
    parts = [(Split.train, config.data.train, samples)]
    if config.data.validation:
        parts.append((Split.valid, config.data.validation, config.evaluation.batches * train.global_batch_size))
    adapter = DatasetTokenizer(
        tokenizer.vocab_size, tokenizer.end_of_document_id, OrderedDict(fingerprint=tokenizer.fingerprint)
    )
    return [Blend(split, sources, samples, config, adapter, cache_dir) for split, sources, samples in parts]
