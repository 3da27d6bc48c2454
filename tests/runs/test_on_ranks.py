"""A run is used on one process or on ranks of its own."""

from pathlib import Path

import pytest

from scmoe.config.as_yaml import to_yaml
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config, load_text
from scmoe.runs.on_ranks import config_without_training

FOUR_SEQUENCES = ("trainer.devices=2", "data.global_batch_size=4", "moe.num_experts=4")


def test_a_run_on_nodes_is_used_in_one_process():
    nodes = ("trainer.devices=2", "trainer.num_nodes=2", "data.global_batch_size=8")
    nodes += ("strategy.dense=hybrid",)
    config = config_without_training(
        lambda words: load_config(None, [*nodes, *words]), Path("weights"), ()
    )
    assert (config.trainer.devices, config.trainer.num_nodes, config.strategy.ep_size) == (
        1,
        1,
        None,
    )


@pytest.mark.parametrize(
    ("words", "asked", "schedule"),
    [
        ("batches_in_flight=2", "trainer.devices=4", (2, "overlapped")),
        ("batches_in_flight=2", "trainer.devices=1", (None, "overlapped")),
        ("transfers=sequential", "trainer.devices=2", (None, "sequential")),
        (
            "batches_in_flight=2",
            "trainer.devices=2 schedule.batches_in_flight=1",
            (1, "overlapped"),
        ),
        (
            "batches_in_flight=2",
            "trainer.devices=2 schedule.transfers=sequential",
            (None, "sequential"),
        ),
    ],
)
def test_between_ranks_a_run_is_used_with_its_own_batches_in_flight(words, asked, schedule):
    """Four ranks have one sequence each of the training's batch, which matters to trainings."""
    run = to_yaml(load_config(None, [*FOUR_SEQUENCES, f"schedule.{words}"]))

    def read(words):
        return load_text(run, "saved", words, trains=False)

    config = config_without_training(read, Path("weights"), asked.split(), "as trained")
    assert (config.schedule.batches_in_flight, config.schedule.transfers) == schedule
    in_one_batch = config_without_training(read, Path("weights"), ("trainer.devices=2",))
    assert in_one_batch.schedule.batches_in_flight is None
    if schedule[0] == 2:
        with pytest.raises(ConfigError, match="one sequence"):
            load_text(run, "saved", asked.split())


def test_probes_of_a_training_do_not_forbid_two_batches_in_its_generation():
    run = to_yaml(load_config(None, [*FOUR_SEQUENCES, "analysis.record_routing=5"]))
    asked = ("trainer.devices=2", "schedule.batches_in_flight=2")
    config = config_without_training(
        lambda words: load_text(run, "saved", words, trains=False), Path("weights"), asked
    )
    assert config.schedule.batches_in_flight == 2
    with pytest.raises(ConfigError, match=r"analysis\.record_routing"):
        load_text(run, "saved", asked)


@pytest.mark.parametrize("words", ["trainer.devices=3", "trainer.devices=8"])
def test_ranks_that_cannot_share_a_training_s_batch_can_use_its_weights(words):
    run = to_yaml(load_config(None, [*FOUR_SEQUENCES, "trainer.accumulate=2"]))
    config = config_without_training(
        lambda words: load_text(run, "saved", words, trains=False), Path("weights"), (words,)
    )
    assert f"trainer.devices={config.trainer.devices}" == words
    with pytest.raises(ConfigError, match=r"data\.global_batch_size"):
        load_text(run, "saved", [words])
