"""What the training of a config costs: the bound of scmoe/predict/bound.py and the counted step of
scmoe/predict/counted_step.py, which take a model and numbers.

Settings that one of them cannot show raise ConfigError.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scmoe.config.derived import rows_are_filled
from scmoe.config.fields import Config
from scmoe.config.halved_batches import check_samples
from scmoe.config.leaves import ConfigError, flatten, show
from scmoe.config.load import keys_of, load_config, read_unchecked
from scmoe.config.registry import IMAGES
from scmoe.parallel.wire.wire import Wire
from scmoe.predict.bound import bound
from scmoe.predict.counted_step import CountedStep, count_step
from scmoe.training.assembly.model import (
    build_model_on_meta,
    build_module,
    build_network,
    updated_by_muon,
)
from scmoe.training.assembly.rank_job import rank_job

NODE = 8  # ranks of a node, where there are more and trainer.devices is not given


def estimate(config: Config) -> dict[str, Any]:
    """Return the costs of a config: per token (image), and for one rank."""
    job = rank_job(config)
    if job.dense == "auto":
        raise ConfigError(
            "strategy.dense is auto, which an estimate cannot choose. Set replicated, sharded or"
            " hybrid"
        )
    model = build_model_on_meta(config)
    unit = "image" if config.data.name in IMAGES else "token"
    return bound(model, job, updated_by_muon(config, model), unit, config.optim.name)


def counted_step(config: Config) -> CountedStep:
    """Run one step of rank 0. The config says how many ranks there are. Raises ConfigError."""
    check(config)

    def build(wire: Wire) -> Any:
        with torch.device("meta"):
            model = build_network(config, wire)
        module: Any = build_module(config)
        module.model = model
        return module

    job = rank_job(config)
    return count_step(
        job, build, lambda: make_batch(config, job.samples), config.trainer.gradient_clip
    )


def make_batch(config: Config, samples: int) -> dict[str, Tensor]:
    """Return a batch of so many samples, all 0."""
    data = config.data
    if data.name in IMAGES:
        images = torch.zeros(samples, 3, data.image_size, data.image_size)
        return {"images": images, "labels": torch.zeros(samples, data.num_classes)}
    ids = torch.zeros(samples, data.seq_len, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def load_for(source: Any, ranks: int, samples: int, overrides: Sequence[str]) -> Config:
    """Return the config on so many ranks with so many samples of each in a batch, on nodes of NODE
    ranks, or of trainer.devices if an override sets them.

    ConfigError: ranks is no multiple of a node's, an override sets what ranks and samples decide,
    samples are too few for two batches in flight, or a rule is broken.
    """
    keys = keys_of(overrides)
    for key in ("trainer.num_nodes", "data.global_batch_size"):
        if key in keys:
            raise ConfigError(
                f"command line: {key} is given, but ranks=N and samples=N set it. Give those alone"
            )
    asked = read_unchecked(source, overrides)
    node = asked.trainer.devices if "trainer.devices" in keys else min(NODE, ranks)
    if node > 0 and ranks % node:
        raise ConfigError(
            f"command line: ranks is {ranks}, which is no multiple of the {node} ranks of a node."
            " trainer.devices=N sets another number"
        )
    check_samples(asked, samples)
    # without a number above 0, `load_config` refuses trainer.devices
    nodes = ranks // node if node > 0 else 1
    # without a number above 0, `load_config` refuses trainer.accumulate
    step = ranks * samples * max(1, asked.trainer.accumulate)
    sizes = [f"trainer.num_nodes={nodes}", f"data.global_batch_size={step}"]
    return load_config(source, [f"trainer.devices={node}", *overrides, *sizes])


def with_slots(config: Config) -> Config:
    """Return the config with moe.rows=slots where `auto` would mean filled slots, whose number
    depends on the data."""
    moe = config.moe
    limited = moe.architecture != "dense" and moe.capacity_factor is not None
    if limited and moe.rows == "auto" and rows_are_filled(config):
        return replace(config, moe=replace(moe, rows="slots"))
    return config


def check(config: Config) -> None:
    """Raise ConfigError for settings that a counted step cannot show: shapes that depend on data,
    more than one batch."""
    trainer, moe = config.trainer, config.moe
    why = "the number of rows must not depend on the data"
    dense = moe.architecture == "dense"
    buffers = moe.rows == "buffers"
    narrow = trainer.precision.startswith("bf16")
    dropless = moe.capacity_factor is None and not buffers
    rules = [
        (trainer.compile, "trainer.compile", "false"),
        (trainer.accumulate > 1, "trainer.accumulate", "1, as one batch is run"),
        (config.strategy.dense == "auto", "strategy.dense", "replicated | sharded | hybrid"),
        (
            not dense and dropless,
            "moe.capacity_factor",
            f"a number, or moe.rows=buffers with a ceiling: {why}",
        ),
        (not dense and not dropless and rows_are_filled(config), "moe.rows", f"slots: {why}"),
        (
            buffers and not narrow,
            "trainer.precision",
            "bf16-mixed | bf16-true for moe.rows=buffers, as torch has it",
        ),
    ]
    for refused, key, allowed in rules:
        if refused:
            raise ConfigError(
                f"--counted: {key} is {show(flatten(config)[key])}, allowed: {allowed}"
            )
