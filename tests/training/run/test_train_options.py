"""Options that say how far a run goes and what it leaves: each has its effect, or is refused in one
line.

The runs are those of configs/debug.yaml in ranks of run_ranks, which start in 0.1 s.
"""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from scmoe.parallel.checkpoint.durable import verify
from scmoe.runs.seen import SeenRun
from scmoe.training.run.resume import find_checkpoint
from tests.support.commands import EXACT, ROOT, Done, column, resume_in_ranks, train_in_ranks

pytestmark = [pytest.mark.smoke, pytest.mark.ranks]
TENSORBOARD = find_spec("tensorboard") is not None or find_spec("tensorboardX") is not None


def train(folder: Path, *words: str, ranks: int = 1) -> Done:
    return train_in_ranks(
        ranks, "configs/debug.yaml", f"runs_dir={folder}", f"trainer.devices={ranks}", *words
    )


def checkpoints(folder: Path) -> dict[str, int]:
    return {path.name: verify(path) for path in (folder / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> Path:
    """Return a run of two ranks that leaves traces, the load of experts and, if installed, files
    of TensorBoard."""
    tensorboard = f"logger.tensorboard={str(TENSORBOARD).lower()}"
    words = ("trainer.profile_steps=1:3", "analysis.expert_load=true", tensorboard)
    return train(tmp_path_factory.mktemp("observed"), *words, ranks=2).run_dir


def test_every_rank_writes_a_trace_of_the_steps_that_are_named(observed):
    names = [f"steps-1-3-rank-{rank}.json.gz" for rank in range(2)]
    assert sorted(path.name for path in (observed / "traces").iterdir()) == names
    for name in names:
        events = json.loads(gzip.decompress((observed / "traces" / name).read_bytes()))[
            "traceEvents"
        ]
        updates = [event for event in events if event.get("name", "").startswith("Optimizer.step#")]
        steps = {event["name"] for event in events if "ProfilerStep#" in event.get("name", "")}
        assert len(updates) == len(steps) == 2
        assert {"scmoe/dispatch", "scmoe/experts"} <= {event.get("name") for event in events}
    assert (observed / "analysis" / "expert_load.png").stat().st_size > 1000
    assert len((observed / "analysis" / "expert_load.csv").read_text().splitlines()) == 1 + 4


def test_early_stopping_ends_all_ranks_after_so_many_validations(tmp_path):
    """With a learning rate near 0 nothing gets better than the first validation by more than
    rounding."""
    words = (
        "trainer.max_steps=40",
        "trainer.val_every=1",
        "trainer.early_stopping=3",
        "optim.lr=1e-30",
    )
    done = train(tmp_path, *words, ranks=2)
    assert done.summary["steps"] == 4
    assert list(column(done.run_dir, "val/loss")) == [0, 1, 2, 3]
    resumed = resume_in_ranks(
        2, str(done.run_dir), "trainer.early_stopping=null", "trainer.max_steps=6"
    )
    assert resumed.summary["steps"] == 6, "it goes on where it was stopped"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (
            ("trainer.early_stopping=1", "trainer.val_every=1", "optim.lr=1e-30"),
            "trainer.early_stopping",
        ),
        (("trainer.extra.max_time.milliseconds=1",), "trainer.extra.max_time"),
    ],
)
def test_a_run_says_which_limit_has_ended_it_and_how_it_goes_on(words, key, tmp_path):
    done = train(tmp_path, "trainer.max_steps=6", *words)
    assert f"{key} has ended the run at step {done.summary['steps']} of 6" in done.err
    (command,) = [line for line in done.err.splitlines() if line.startswith("resume ")]
    word = command.split()[-1]
    assert word == f"{key}=null"
    assert resume_in_ranks(1, str(done.run_dir), word).summary["steps"] == 6


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Return a run of eight steps that keeps the checkpoints of its three best validations, on two
    ranks."""
    words = ("trainer.max_steps=8", "trainer.val_every=1", "trainer.save_top_k=3", "optim.lr=1e-2")
    return train(tmp_path_factory.mktemp("many"), *words, ranks=2).run_dir


@pytest.mark.faults
def test_the_best_validations_are_kept_and_the_best_one_is_found(many):
    losses = column(many, "val/bits_per_byte")
    best = sorted(losses, key=losses.__getitem__)[:3]
    assert set(checkpoints(many)) == {
        "step=8.ckpt",
        *(f"best-step={step + 1}.ckpt" for step in best),
    }
    assert find_checkpoint(many, "best").name == f"best-step={best[0] + 1}.ckpt"
    assert find_checkpoint(many).name in ("step=8.ckpt", "best-step=8.ckpt")


@pytest.mark.faults
def test_a_run_goes_on_from_a_chosen_step_as_it_did_before(many):
    """Every metric of the steps that are done again is the same, and later checkpoints are out of
    the way."""
    before, there = column(many, "train/loss"), checkpoints(many)
    chosen = min(there.values())
    refused = resume_in_ranks(2, str(many), "step=77")
    assert refused.code == 2
    assert f"step is 77, allowed: {chosen}, " in refused.err
    # an earlier resumption from the end
    (many / "config-from-8.yaml").write_text((many / "config.yaml").read_text())
    done = resume_in_ranks(2, str(many), f"step={chosen}", "trainer.val_every=100")
    assert done.summary["steps"] == 8 and "set aside: " in done.err
    assert column(many, "train/loss") == before
    aside = {path.name.rpartition("-")[0] for path in (many / "set-aside").iterdir()}
    later = {name for name, step in there.items() if step > chosen}
    assert aside == later | {"config-from-8.yaml", "summary.json"}
    assert SeenRun(many).config["trainer.val_every"] == "100", "the newest configuration is shown"
    assert set(checkpoints(many).values()) == {chosen, 8}
    assert f"config-from-{chosen}.yaml" in {path.name for path in many.iterdir()}


def test_limits_end_a_run_and_shorten_validations(tmp_path):
    """The learning rate is that of all steps. One batch of validation is half of the eight
    sequences."""
    ends = [
        train(
            tmp_path,
            f"trainer.limit_train_batches={n}",
            "trainer.accumulate=2",
            "trainer.max_steps=6",
            *words,
        )
        for n, words in ((6, ["trainer.limit_val_batches=1"]), ("null", []))
    ]
    short, whole = (done.run_dir for done in ends)
    unigrams = [done.summary["unigram_bits_per_byte"] for done in ends]
    assert unigrams[0] is None and unigrams[1] > 0, "it is that of the whole split"
    lr, of_all = column(short, "train/lr"), column(whole, "train/lr")
    assert lr == {step: of_all[step] for step in range(3)}
    assert column(short, "train/loss") == {
        step: column(whole, "train/loss")[step] for step in range(3)
    }
    assert column(short, "val/loss")[1] != column(whole, "val/loss")[1]
    done = resume_in_ranks(1, str(short))
    assert "nothing to do: all 3 steps are done" in done.err


def test_a_text_run_without_validation_says_so_and_ends_with_samples(tmp_path):
    """Matrices are gathered in bfloat16 and biases in float32; the second run ended between its
    last step and its summary, so that its first pass is the one of the samples."""
    text = (
        "data.name=text",
        f"data.path={ROOT}/docs/decisions",
        "data.vocab_size=512",
        f"data.cache_dir={tmp_path}",
    )
    split = (
        "strategy.dense=sharded",
        "trainer.precision=bf16-mixed",
        "trainer.limit_val_batches=0",
    )
    first = train(tmp_path, *text, *split, ranks=2)
    assert first.summary["val_loss"] is None and first.summary["steps"] == 4
    assert "none, as trainer.limit_val_batches is 0" in first.err
    folder = first.run_dir
    assert not column(folder, "val/loss") and set(checkpoints(folder)) == {"step=4.ckpt"}
    (folder / "summary.json").unlink()
    done = resume_in_ranks(2, str(folder))
    assert done.summary["steps"] == 4 and "│ sample" in done.err, done.err


@pytest.mark.faults
def test_overfitting_repeats_the_first_batches_also_when_it_is_resumed(tmp_path):
    """At a learning rate near 0 the same batch has the same loss."""
    words = (
        "trainer.overfit_batches=2",
        "trainer.max_steps=5",
        "optim.lr=1e-30",
        "moe.noisy=false",
    )
    folder = train(tmp_path, *words, ranks=2).run_dir
    losses = list(column(folder, "train/loss").values())
    assert losses == [losses[0], losses[1]] * 2 + [losses[0]]
    assert losses[0] != losses[1]
    refused = resume_in_ranks(2, str(folder), "trainer.overfit_batches=null", "trainer.max_steps=6")
    assert (refused.code, refused.err.count("trainer.overfit_batches is null, allowed: 2")) == (
        2,
        1,
    )
    resume_in_ranks(2, str(folder), "trainer.max_steps=6")
    assert list(column(folder, "train/loss").values()) == [*losses, losses[1]]


@pytest.mark.faults
def test_a_resumed_run_may_have_another_precision_and_not_another_accumulate(tmp_path):
    """Moments take the type of their weights. Lightning counts batches, so an update would fall
    between two steps."""
    folder = train(tmp_path).run_dir
    refused = resume_in_ranks(1, str(folder), "trainer.accumulate=2", "trainer.max_steps=6")
    assert (refused.code, refused.err.count("trainer.accumulate is 2, allowed: 1")) == (2, 1)
    done = resume_in_ranks(1, str(folder), "trainer.precision=64-true", "trainer.max_steps=6")
    assert done.summary["steps"] == 6, done.err
    whole = train(tmp_path / "whole", "trainer.max_steps=6").run_dir
    expected = column(whole, "train/lr")[4]
    assert column(folder, "train/lr")[4] == pytest.approx(expected, rel=1e-6), (
        "the first step has the new cosine, too"
    )


@pytest.mark.faults
def test_losses_of_a_step_are_those_of_all_its_batches(tmp_path):
    """The same samples in one batch and in two; dropout, noise and a loss that is no mean over
    samples would differ."""
    words = (*EXACT, "model.dropout=0", "moe.load_balance_coef=0", "trainer.precision=64-true")
    one, two = (train(tmp_path / str(n), *words, f"trainer.accumulate={n}").run_dir for n in (1, 2))
    for name in ("train/loss", "train/router_z_loss"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-6)


def test_a_fast_dev_run_goes_through_everything_once(tmp_path):
    done = train(
        tmp_path, "trainer.fast_dev_run=true", "logger.mode=offline", "trainer.early_stopping=1"
    )
    folder = done.run_dir
    assert done.summary["steps"] == 1 and done.summary["val_loss"] > 0
    assert set(checkpoints(folder)) == {"step=1.ckpt"}
    assert not list(folder.glob("wandb*"))
    again = resume_in_ranks(1, str(folder), "trainer.max_steps=3")
    assert (again.code, "trainer.fast_dev_run is true" in again.err) == (2, True)


def test_further_arguments_reach_the_trainer_or_are_refused(tmp_path):
    done = train(tmp_path, "trainer.extra.max_time=00:00:00:00")
    assert done.summary["steps"] < 4, "the time is over"
    for words, said in (
        ("trainer.extra.strategy=ddp", "trainer.extra is {'strategy': 'ddp'}"),
        ("trainer.extra.max_tim=1", "no argument max_tim. Did you mean max_time?"),
        ("trainer.extra.max_time=soon", "Lightning's Trainer does not take trainer.extra"),
    ):
        refused = train(tmp_path, words)
        (line,) = [line for line in refused.err.splitlines() if line.startswith("error: ")]
        assert refused.code == 2 and said in line


@pytest.mark.skipif(not TENSORBOARD, reason="tensorboard is not installed (extra `tensorboard`)")
def test_tensorboard_gets_the_metrics(observed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = EventAccumulator(str(observed / "tensorboard"))
    found.Reload()
    logged = {event.step: event.value for event in found.Scalars("train/loss")}
    assert logged == pytest.approx(column(observed, "train/loss"))
    assert [event.value for event in found.Scalars("train/tokens")][-1] == 4 * 4 * 16
    (heat_map,) = found.Images("moe/expert_load")
    assert heat_map.step == 4 and heat_map.encoded_image_string.startswith(b"\x89PNG")
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (values["optim.lr"].number_value, values["moe.architecture"].string_value) == (
        1e-3,
        "scmoe",
    )
