"""`make generate` writes the same texts on any number of ranks, from a checkpoint and from an
export."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.engine.ranks import run_ranks
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.command_line import call
from scmoe.inference.generate import Passes
from scmoe.inference.generate import generate as generate_here
from scmoe.inference.sampling import GREEDY, Stopping
from scmoe.moe.dispatcher import Blocking
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.mesh import build_mesh
from scmoe.parallel.wire.wire import Wire
from scmoe.training.assembly.model import build_model
from tests.support.commands import (
    called,
    command_here,
    command_in_ranks,
    train_in_ranks,
    train_on_text,
)
from tests.support.models import tiny
from tests.support.sentences import sentences

pytestmark = [pytest.mark.ranks, pytest.mark.inference]

NEW = 12
PROMPTS = ["Peace", "The union of people", "Labor and land. State", "Congress", "Nations"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Return the directory of a run of two ranks on a small text, with an export; its experts drop
    tokens."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS)
    )
    sizes = (
        "data.seq_len=48",
        "trainer.max_steps=3",
        "moe.noisy=false",
        "moe.capacity_factor=1",
        "schedule.chunks=2",
    )
    run_dir = train_on_text(
        folder, 2, *sizes, "strategy.wire_dtype=bfloat16", "strategy.dense=sharded"
    )
    assert call("export", str(run_dir)) == 0
    return run_dir


def prompts_of(run_dir: Path) -> Path:
    return run_dir.parents[1] / "prompts.jsonl"


def written(
    world_size: int, weights: Path, run_dir: Path, out: Path, *words: str
) -> list[dict[str, Any]]:
    """Return the lines of the file. Products in float64 do not round differently enough to change
    a draw."""
    asked = (
        "--prompts",
        str(prompts_of(run_dir)),
        "--out",
        str(out),
        "--max-tokens",
        str(NEW),
        "--batch-size",
        "2",
    )
    ranks = (f"trainer.devices={world_size}", "trainer.precision=64-true")
    done = command_in_ranks("generate", world_size, str(weights), *asked, *ranks, *words)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.summary["dropless"] and done.summary["tokens"] == sum(
        line["tokens"] for line in lines
    )
    assert [line["prompt"] for line in lines] == PROMPTS
    return lines


@pytest.fixture(scope="module")
def alone(run_dir) -> list[dict[str, Any]]:
    out = run_dir / "alone.jsonl"
    out.write_text("of an earlier request\n")  # is replaced
    return written(1, run_dir, run_dir, out)


def test_texts_do_not_depend_on_ranks_or_on_where_weights_are(run_dir, alone, tmp_path):
    """Two and four ranks have five prompts in blocks of four and eight, so some ranks have fewer
    texts, or none."""
    assert len({line["text"] for line in alone}) == len(PROMPTS)
    assert written(4, run_dir, run_dir, tmp_path / "4.jsonl", "strategy.ep_size=2") == alone
    # the longest prompt of a rank, and so its number of pieces, differs between ranks
    assert written(2, run_dir, run_dir, tmp_path / "2.jsonl", "--prefill-tokens", "3") == alone
    export = run_dir / "export/model.safetensors"
    two_batches = "schedule.batches_in_flight=2"
    assert written(2, export, run_dir, tmp_path / "export.jsonl", two_batches) == alone


def test_one_text_is_shown_on_rank_0_as_it_comes(run_dir, alone):
    words = (
        str(run_dir),
        "--prompt",
        PROMPTS[0],
        "--max-tokens",
        str(NEW),
        "trainer.precision=64-true",
    )
    done = command_in_ranks("generate", 2, *words, "trainer.devices=2")
    assert (done.code, done.out) == (0, alone[0]["text"] + "\n")
    assert "step=3.ckpt" in done.err


def test_offloaded_experts_write_the_same_texts(run_dir, tmp_path):
    """From a checkpoint, and from an export: the store is written once and then taken as it is."""

    def texts(weights: Path, *words: str) -> tuple[list[str], dict[str, Any]]:
        out = tmp_path / "texts.jsonl"
        asked = ("--prompts", str(prompts_of(run_dir)), "--out", str(out), "--max-tokens", "6")
        speed = called("generate", str(weights), *asked, *words).summary
        return [json.loads(line)["text"] for line in out.read_text().splitlines()], speed

    expected, speed = texts(run_dir)
    assert "offload" not in speed
    stored = []
    torch.set_num_threads(2)
    for way in ("blocking", "determinate", "speculative"):
        found, speed = texts(run_dir, f"offload.way={way}", "offload.slots=2")
        assert (
            found == expected
            and speed["offload"]["way"] == way
            and 0 < speed["offload"]["hit_rate"] < 1
        )
        stored.append((run_dir / "offload/step=3.ckpt.experts.safetensors").stat().st_mtime_ns)
    assert len(set(stored)) == 1 and torch.get_num_threads() == 1, "as with resident experts"
    assert texts(run_dir / "export/model.safetensors", "offload.way=determinate")[0] == expected
    store = run_dir / "offload/step=3.ckpt.experts.safetensors"
    store.write_bytes(store.read_bytes()[:-1])
    cut = called("generate", str(run_dir), "offload.way=blocking")
    assert cut.code == 2 and "it is cut" in cut.err and len(cut.err.splitlines()) == 1
    store.unlink()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-tokens", "48"], "prompt 1 has 1 tokens and --max-tokens is 48, allowed: 48"),
        (["--prompt", "Peace" * 60], "shorten the prompt"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a\udcff"], "the prompt's character 2 is not Unicode"),
        (["--temperature", "nan"], "--temperature"),
        (["--stop", ""], "stop string is empty"),
        (["--seed", "-1"], "the seed is -1, allowed: 0 to 2^63 - 1"),
        (["--prompts", "/none.jsonl", "--out", "/none.out"], "/none.jsonl cannot be read"),
        (["--prompts", "PROMPTS", "--out", "PROMPTS"], "Give another file"),
        (["--prompts", "PROMPTS", "--out", "/none/out.jsonl"], "--out is /none/out.jsonl"),
        (["--prefill-tokens", "0"], "--prefill-tokens"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--batch-size", "0"], "--batch-size"),
        (["--top-k", "-1"], "--top-k"),
        (["--top-p", "0"], "--top-p"),
        (["offload.slots=2"], "offload.slots is 2, allowed: null"),
        (["offload.way=blocking", "trainer.devices=2"], "allowed: resident"),
        (
            ["offload.way=speculative", "offload.slots=1"],
            "offload.slots is 1, allowed: null, or 2 or more",
        ),
        (["moe.top_k=2"], "moe.top_k is 2, allowed: 1"),
        (["trainer.devices=3", "strategy.ep_size=2"], "strategy.ep_size is 2, allowed"),
    ],
)
def test_a_wrong_request_is_one_line_before_a_model_is_built(run_dir, monkeypatch, words, says):
    monkeypatch.setattr(
        "scmoe.runs.generate.start_ranks", lambda *_: pytest.fail("a model is built")
    )
    done = called(
        "generate",
        str(run_dir),
        *(word.replace("PROMPTS", str(prompts_of(run_dir))) for word in words),
    )
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done
    assert says in done.err


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '{"text": "a"}',
        '{"prompt": 1}',
        '{"prompt": "a", "seed": true}',
        '{"prompt": ""}',
        '{"prompt": "\\ud800"}',
        f'{{"prompt": "a", "seed": {2**63}}}',
    ],
)
def test_a_wrong_line_of_prompts_is_named(run_dir, tmp_path, line):
    (tmp_path / "wrong.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    done = called(
        "generate",
        str(run_dir),
        "--prompts",
        str(tmp_path / "wrong.jsonl"),
        "--out",
        str(tmp_path / "out"),
    )
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "wrong.jsonl, line 2" in done.err


def test_a_refused_request_leaves_earlier_texts(run_dir, tmp_path):
    out, prompts = tmp_path / "out.jsonl", prompts_of(run_dir)
    out.write_text("earlier\n")
    assert (
        called(
            "generate", str(tmp_path / "none"), "--prompts", str(prompts), "--out", str(out)
        ).code
        == 2
    )
    assert out.read_text() == "earlier\n"
    out.unlink()
    assert (
        called(
            "generate", str(tmp_path / "none"), "--prompts", str(prompts), "--out", str(out)
        ).code
        == 2
    )
    assert not out.exists(), "a file that was not there is not made"


def test_ranks_share_the_reading_of_a_checkpoint(run_dir, tmp_path):
    """Each file is read once to verify it, whatever the number of ranks: generate on two, evaluate
    on one."""
    generate = ("generate", str(run_dir), "--max-tokens", "1", "trainer.devices=2")
    evaluate = ("evaluate", str(run_dir), "--which", "best", "logger.mode=disabled")
    files = [
        sorted(
            file.name
            for file in (run_dir / "checkpoints" / name).iterdir()
            if file.name != durable.MANIFEST
        )
        for name in ("step=3.ckpt", "best-step=2.ckpt")
    ]
    of_ranks = run_ranks(verified, 2, generate)
    assert sorted(name for names in of_ranks for name in names) == files[0] and all(of_ranks)
    assert sorted(verified(0, 1, evaluate)) == files[1]


def test_a_damaged_checkpoint_is_found_where_it_is_loaded(run_dir, tmp_path):
    """The error says how to use the one before it."""
    damaged = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shard = next((damaged / "checkpoints/step=3.ckpt").glob("shard*"))
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(durable.BrokenCheckpoint, match=rf"{shard.name} is damaged") as caught:
        called("generate", str(damaged))
    shutil.move(damaged / "checkpoints/step=3.ckpt", tmp_path)
    assert "step=3.ckpt out of its folder" in "".join(caught.value.__notes__)
    assert "best-step=2.ckpt" in called("generate", str(damaged), "--max-tokens", "1").err


def verified(rank: int, world_size: int, words: tuple[str, ...]) -> list[str]:
    """Run a verb; return the files of checkpoints whose content it compares with the manifest."""
    names: list[str] = []
    fingerprint = durable.fingerprint

    def spied(path: Path) -> dict[str, Any]:
        names.append(path.name)
        return fingerprint(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "fingerprint", spied)
        assert command_here(rank, world_size, words[0], words[1:], {}).code == 0
    return names


def test_a_text_that_makes_another_tokenizer_is_refused(run_dir, tmp_path):
    """Its ids would mean other words to the weights."""
    (tmp_path / "other.txt").write_text("\n".join(sentences(700, seed) for seed in range(5, 9)))
    for weights in (run_dir, run_dir / "export/model.safetensors"):
        done = called("generate", str(weights), f"data.path={tmp_path}/other.txt")
        assert done.code == 2 and "another tokenizer than in training" in done.err
    assert call("evaluate", str(run_dir), f"data.path={tmp_path}/other.txt") == 2
    start = (
        f"init_from=scmoe:{run_dir}/export/model.safetensors",
        f"data.path={tmp_path}/other.txt",
    )
    assert (
        call(
            "train",
            str(run_dir / "config.yaml"),
            *start,
            "trainer.devices=1",
            f"runs_dir={tmp_path}",
        )
        == 2
    )
    assert call("export", str(run_dir), "--format", "hf", f"data.path={tmp_path}/other.txt") == 2


def test_an_edited_config_of_an_export_is_refused(run_dir, tmp_path):
    exported = run_dir / "export"
    shutil.copy(exported / "model.safetensors", tmp_path)
    config = (exported / "config.yaml").read_text()
    assert "position: pos2" in config
    (tmp_path / "config.yaml").write_text(config.replace("position: pos2", "position: pos1"))
    done = called("generate", str(tmp_path / "model.safetensors"))
    assert done.code == 2 and "moe.position is 'pos1', allowed: 'pos2'" in done.err


def test_a_run_on_other_data_is_refused(tmp_path):
    words = (
        "configs/debug.yaml",
        "trainer.max_steps=1",
        "trainer.val_every=1",
        f"runs_dir={tmp_path}",
    )
    done = called("generate", train_in_ranks(1, *words).summary["run_dir"], "--stop", "a")
    assert done.code == 2 and "synthetic data" in done.err


# ---------------------------------------------------------------------- in lockstep


def continued(
    rank: int, world_size: int, ep_size: int, prompts: list[list[list[int]]]
) -> list[Any]:
    """Return the continuations of this rank's prompts, and for each pass, whether it is
    sequential; at last, whether the model is left so."""
    torch.distributed.init_process_group("gloo")
    wire = Wire(build_mesh(ep_size, torch.device("cpu"), timedelta(seconds=60)))
    model = model_in(wire)
    blocks = moe_blocks_of(model)
    passes = []

    def note(*_: Any) -> None:
        passes.append({isinstance(block.moe.dispatcher, Blocking) for block in blocks})

    hook = model.register_forward_pre_hook(note)
    texts = generate_here(
        model,
        prompts[rank],
        Stopping(NEW, ENDS),
        GREEDY,
        passes=Passes(wire.mesh.true_on_all_ranks),
    )
    hook.remove()
    note()
    return texts, passes


ENDS = frozenset(range(0, 64, 7))  # texts end after different numbers of tokens


def model_in(wire: Wire) -> Any:
    model = (
        build_model(tiny("data.seq_len=32", "moe.top_k=2", "moe.capacity_factor=null"), wire)
        .double()
        .eval()
    )
    for p in model.parameters():
        p.data *= 4  # so that texts differ
    return model


def test_ranks_go_on_until_the_last_text_has_ended():
    """Rank 1 has no prompt, rank 2 has three: their numbers of texts, tokens and steps differ.
    Prefill is overlapped, decoding sequential."""
    prompts = [[[1, 2, 3]], [], [[4], [5, 6, 7, 8], [9, 10]], [[11, 12]]]
    model = model_in(Wire())
    alone = [
        [generate_here(model, [prompt], Stopping(NEW, ENDS), GREEDY)[0] for prompt in own]
        for own in prompts
    ]
    lengths = {len(text.ids) for own in alone for text in own}
    assert len(lengths) > 1, "all texts end at the same step"
    of_ranks = run_ranks(continued, 4, 2, prompts)
    assert [texts for texts, _ in of_ranks] == alone
    for _, (prefill, *decode, afterwards) in of_ranks:
        assert prefill == afterwards == {False}
        assert len(decode) > 1 and all(kinds == {True} for kinds in decode)
