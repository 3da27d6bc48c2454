"""A job has the batches, ranks and stages that its owner means."""

from dataclasses import replace

import pytest

from scmoe.config.leaves import ConfigError
from scmoe.predict.asked_config import read_asked
from scmoe.predict.batches import InFlight
from scmoe.predict.cluster import overridden, read_profile
from scmoe.predict.compared_models import job_of
from scmoe.predict.judged_job import Request
from tests.support.advised import counted_on


def test_the_batch_of_a_config_is_that_of_all_ranks():
    """As `scmoe estimate` reads it."""
    profile = read_profile("2x8xA800")
    words = ["data.global_batch_size=256", "model.layers=2"]
    job = job_of(Request(read_asked("quickstart", words)), profile)
    assert (job.samples, job.accumulate, job.tokens) == (16, 1, 256 * 256)
    job = job_of(Request(read_asked("quickstart", words), samples=4), profile)
    assert (job.samples, job.accumulate, job.tokens) == (4, 4, 256 * 256)
    job = job_of(Request(read_asked("quickstart", words), samples=4, tensor_parallel=4), profile)
    assert (job.samples, job.accumulate, job.tokens) == (4, 16, 256 * 256)
    with pytest.raises(ConfigError, match="samples is 3"):
        job_of(Request(read_asked("quickstart", words), samples=3), profile)


def test_the_step_of_a_preset_is_in_as_few_batches_as_fit():
    profile = read_profile("8xA30-PCIe", [])
    request = Request(read_asked("gpt2_moe_small", ["model.layers=2"]), ep_size=8)
    job, models = counted_on(profile, request, "top2")
    assert job.accumulate == 1
    needed = models["top2"].memory(8, 1, InFlight.ONE)
    less = overridden(profile, [f"cluster.memory_gb={0.7 * needed / 1e9}"])
    other, smaller = counted_on(less, request, "top2")
    assert other.accumulate == 2 and other.tokens == job.tokens
    assert smaller["top2"].memory(8, 1, InFlight.ONE) <= less.memory
    given = replace(request, samples=16)
    assert job_of(given, less).accumulate == 1, "what is given is kept"
    in_four = Request(read_asked("gpt2_moe_small", ["model.layers=2", "trainer.accumulate=4"]))
    four = job_of(in_four, profile)
    assert (four.accumulate, four.tokens) == (4, job.tokens)
    in_seven = Request(read_asked("gpt2_moe_small", ["trainer.accumulate=7"]))
    with pytest.raises(ConfigError, match="allowed: a divisor of 16"):
        job_of(in_seven, profile)


def test_a_stage_of_a_pipeline_has_its_layers_and_ranks():
    profile = read_profile("8x8xH100-InfiniBand")
    job = job_of(Request(read_asked("gpt2_moe_medium"), stage_layers=6, samples=2), profile)
    assert job.sizes.stages == 4 and job.sizes.ranks == 16 and job.sizes.missing == 0
    assert job.config.model.layers == 6 and not job.knows_memory


def test_stages_do_not_lie_across_nodes():
    """24 ranks in four stages would be six ranks each, some of two nodes of eight."""
    asked = read_asked("gpt2_moe_medium")
    with pytest.raises(ConfigError, match="a stage has 6 ranks and lies across nodes of 8"):
        job_of(Request(asked, ranks=24, stage_layers=6), read_profile("8x8xH100-InfiniBand"))


def test_blocks_of_images_have_no_pipeline_and_their_prefill_mixes_no_pairs():
    """Training mixes the images of a batch in pairs."""
    profile = read_profile("8xH100")
    words = ["data.name=image_folder", "data.path=images", "data.image_size=192", "data.mixup=0.8"]
    asked = read_asked("swinv2_moe_s_tiny", words)
    job = job_of(Request(asked, samples=1, prefill=True), profile)
    assert job.samples == 1 and job.config.data.mixup == 0
    with pytest.raises(ConfigError, match="stage_layers is given"):
        job_of(Request(asked, stage_layers=2), profile)


@pytest.mark.parametrize("folder", ["model", "configs/model"])
def test_a_file_of_ones_own_in_a_folder_named_model_has_its_batch(folder, tmp_path):
    """Presets of configs/model say none."""
    file = tmp_path / folder / "mine.yaml"
    file.parent.mkdir(parents=True)
    text = "extends: quickstart\nmodel: {layers: 2}\ndata: {global_batch_size: 256}\n"
    file.write_text(text, encoding="utf-8")
    job = job_of(Request(read_asked(file)), read_profile("2x8xA800"))
    assert (job.samples, job.accumulate, job.tokens) == (16, 1, 256 * 256)


def test_keys_in_a_mapping_are_given_as_dotted_ones_are():
    """With both, the batch of a preset is the given one."""
    for word in ("data.global_batch_size=64", "data={global_batch_size: 64}"):
        asked = read_asked("gpt2_moe_small", ["model.layers=2", word])
        assert job_of(Request(asked), read_profile("8xH100")).samples == 8
    asked = read_asked("quickstart", ["strategy={ep_size: 4}"])
    with pytest.raises(ConfigError, match=r"strategy\.ep_size is given"):
        job_of(Request(asked), read_profile("8xH100"))
