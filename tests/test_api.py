"""The drop-in block is the block that a configuration builds. test_wrap.py has its gradients on two
ranks."""

import io
import math
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import scmoe
from experiments.engine.ranks import run_ranks
from scmoe.api import SHORTCUT_NAMES
from scmoe.blocks.wirings import WIRINGS
from scmoe.moe.router import Scoring, SelectionBias, by_sign
from scmoe.parallel.dense.sharded import local, make_equal, shard, with_dense_mesh
from scmoe.parallel.mesh import build_mesh
from scmoe.training.assembly.blocks import build_blocks
from tests.support.commands import ROOT, environment
from tests.support.forked import python

SIZES = "model.dim=16 model.heads=2 model.layers=2 data.seq_len=8 moe.num_experts=4"


@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
@pytest.mark.parametrize("combine", ["direct_add", "cg1", "cg2"])
def test_it_is_the_block_of_a_configuration(position, combine):
    words = (
        f"{SIZES} moe.position={position} moe.combine={combine} moe.top_k=2"
        " moe.capacity_factor=null"
    )
    (built,) = build_blocks(scmoe.load_config(None, words.split()), scmoe.Wire())
    block = scmoe.ScMoEBlock(16, 2, 4, 2, position, combine)
    assert block.schedule == built.schedule
    block.load_state_dict(built.state_dict())
    x_BSD = torch.randn(2, 8, 16)
    assert torch.equal(block(x_BSD)[0], built(x_BSD)[0])


@pytest.mark.parametrize("shortcut", [name for name in SHORTCUT_NAMES if name != "scmoe"])
@pytest.mark.parametrize("router", ["softmax", "longcat"])
def test_other_shortcuts_and_routers_are_those_of_a_configuration(shortcut, router):
    top_k, experts = 1 if shortcut == "dgmoe" else 2, {"router": router, "zero_experts": 2}
    words = (
        f"{SIZES} moe.capacity_factor=null moe.top_k={top_k} moe.router={router} moe.zero_experts=2"
    )
    wiring = WIRINGS[shortcut]
    if shortcut == "dgmoe":
        wiring = replace(wiring, position="pos3")
    config = scmoe.load_config(None, [*words.split(), *wiring.overrides])
    built = build_blocks(config, scmoe.Wire())
    assert len(built) == 2 // wiring.every
    ours, theirs = {"x_BSD": torch.randn(2, 8, 16)}, {}
    theirs |= ours
    for i, block in enumerate(built):
        position = {"nous": ("first", "carried")[i], "dgmoe": "pos3"}.get(shortcut)
        mine = scmoe.ScMoEBlock(16, 2, 4, top_k, position, shortcut=shortcut, **experts)
        mine.load_state_dict(block.state_dict())
        assert (
            mine.schedule == block.schedule and mine.moe.router.scoring == block.moe.router.scoring
        )
        y, stats, *carry = mine(**ours)
        y_built, _, *carry_built = block(**theirs)
        assert torch.equal(y, y_built)
        ours, theirs = (
            {"x_BSD": x, **({"carry": c[0]} if c else {})}
            for x, c in ((y, carry), (y_built, carry_built))
        )
    if router == "longcat":
        scmoe.move_biases(mine, [stats])
        assert mine.moe.router.bias.weight.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"combine": "cg3"}, "combine is 'cg3', allowed: direct_add | cg1 | cg2"),
        ({"position": "carried"}, "position is 'carried', allowed: pos1 | pos2 | pos3"),
        ({"shortcut": "none"}, "shortcut is 'none', allowed: scmoe | longcat"),
        ({"shortcut": "farskip", "combine": "cg1"}, "combine is 'cg1', allowed: None"),
        ({"router": "relu"}, "router is 'relu', allowed: softmax | deepseek | longcat"),
        ({"heads": 3}, "heads is 3, allowed: divisors of dim"),
        ({"top_k": 5}, "top_k is 5, allowed: 1..num_experts"),
        ({"expert_slot": 9}, "slot is 9, allowed"),
        *(
            ({"capacity_factor": f}, f"capacity_factor is {f}, allowed: None, or above 0")
            for f in (-1, 0.0, math.nan)
        ),
        *(({"ffn_dim": n}, f"ffn_dim is {n}, allowed: 1 or more") for n in (-8, 0)),
        (
            {"activation": "swiglu", "ffn_dim": 0},
            "dim is 16 and ffn_dim is 0, allowed: multiples of 8",
        ),
        ({"activation": "relu"}, "activation is 'relu', allowed: gelu | gelu_tanh | swiglu"),
    ],
    ids=str,
)
def test_wrong_numbers_are_refused(given, message):
    make = scmoe.MoE if "activation" in given else partial(scmoe.ScMoEBlock, heads=2)
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**{"dim": 16, "num_experts": 4, **given})


def test_a_router_of_ones_own_is_taken_and_checked():
    scoring = Scoring(torch.sigmoid, sums_to_one=False, scale=2.0)
    assert scmoe.ScMoEBlock(16, 2, 4, router=scoring).moe.router.scoring is scoring
    with pytest.raises(ValueError, match="sums_to_one"):
        scmoe.MoE(16, 4, router=Scoring(torch.sigmoid))


@pytest.mark.parametrize("shape", [(8, 16), (1, 2, 8, 16)], ids=str)
def test_an_input_without_batch_or_with_more_is_refused(shape):
    with pytest.raises(
        ValueError, match=re.escape(f"x has the shape {shape}, allowed: (batch, sequence, 16)")
    ):
        scmoe.ScMoEBlock(16, 2, 4)(torch.randn(shape))


@pytest.mark.parametrize(
    "make", [partial(scmoe.ScMoEBlock, heads=2), partial(scmoe.MoE, activation="swiglu")]
)
def test_a_module_with_experts_can_be_pickled(make):
    module, file = make(16, num_experts=4), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again, x_BSD = torch.load(file, weights_only=False), torch.randn(2, 8, 16)
    assert torch.equal(again(x_BSD)[0], module(x_BSD)[0])


# ---------------------------------------------------------------------- on two ranks


def wrapped_wrongly(rank: int, world_size: int) -> list[str]:
    """Return what is said of two mistakes after which expert gradients would not be averaged."""
    dist.init_process_group("gloo")
    said = []
    for built_with, group in ((None, dist.group.WORLD), (dist.group.WORLD, None)):
        try:
            scmoe.data_parallel(scmoe.ScMoEBlock(16, 2, 4, 2, ffn_dim=32, group=built_with), group)
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.ranks
def test_a_group_that_is_not_that_of_the_experts_is_refused():
    for said in run_ranks(wrapped_wrongly, 2):
        assert "holds experts 0 to 3 on rank" in said[0]
        assert said[1].startswith("group is None on several ranks")


def drawn_apart(rank: int, world_size: int, how: str) -> list[torch.Tensor]:
    """Return this rank's part of all weights of a module that each rank has drawn from another
    generator."""
    dist.init_process_group("gloo")
    device, timeout = torch.device("cpu"), timedelta(seconds=60)
    mesh = build_mesh(1, device, timeout)
    torch.manual_seed(rank)
    moe = scmoe.MoE(16, 4, ffn_dim=32)
    moe.router.bias = SelectionBias(4, 0, Scoring(rule=by_sign))
    nn.init.constant_(moe.router.bias.weight, rank)
    module = nn.Sequential(nn.Linear(16, 16), moe)
    module.register_buffer("statistics", torch.rand(3, 2).T)
    if how == "hybrid":
        mesh = with_dense_mesh(mesh, how, 2, device, timeout)
        shard(module, mesh, "32-true")
    make_equal(module, mesh)
    names = ["0.weight"] if how == "hybrid" else ["1.experts.w_in_eDF", "1.experts.w_out_eFD"]
    names.append("1.router.bias.weight")
    buffers = [module.statistics] if how == "hybrid" else []  # else DDP makes them equal
    return [*(local(module.get_parameter(name)).detach().clone() for name in names), *buffers]


@pytest.mark.ranks
@pytest.mark.parametrize(("how", "ranks"), [("replicated", 2), ("hybrid", 4)])
def test_ranks_with_the_same_part_of_a_weight_begin_with_the_same_values(how, ranks):
    parts = run_ranks(drawn_apart, ranks, how)
    for one, other in zip(parts[: ranks // 2], parts[ranks // 2 :], strict=True):
        assert all(map(torch.equal, one, other))


# ---------------------------------------------------------------------- the names of the package


def test_every_name_is_found_and_no_other():
    assert sorted(scmoe.__all__) == sorted(scmoe.PUBLIC) and {*scmoe.__all__} <= {*dir(scmoe)}
    assert all(getattr(scmoe, name) is not None for name in scmoe.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'Moe', allowed: .*MoE"):
        _ = scmoe.Moe


PROGRAM = """
import gc, os, sys
gc.disable()  # imports would make it look for garbage

def apart(check):  # in a copy of this process, as no import can be undone
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            check()
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.wait()

def package():
    finders = [*sys.meta_path]
    import scmoe
    print({"torch", "lightning"} & {*sys.modules}, sys.meta_path == finders)

def block():
    import scmoe
    scmoe.ScMoEBlock(16, 2)
    print({"lightning", "omegaconf", "rich"} & {*sys.modules})

apart(package)
import torch
apart(block)
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

def outside():
    names = {name: vars(module) for name, module in sys.modules.items()}
    return {
        (module, name): id(value)
        for module, values in names.items() if module.startswith(("lightning", "torch"))
        for name, value in [*values.items()] if callable(value)
    }, [*sys.meta_path], {*StrategyRegistry}

before = outside()
import scmoe
print(outside() == before)
try:
    Trainer(strategy="expert_parallel")
except ValueError as error:
    print("ddp" in str(error))
import scmoe.lightning
print({*StrategyRegistry} - before[2])
for strategy in ("expert_parallel", scmoe.ExpertParallelStrategy()):
    print(type(Trainer(strategy=strategy, accelerator="cpu", logger=False).strategy).__name__)
sys.stdout.flush()
os._exit(0)  # the end of the interpreter would take a second
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """Return what a program prints that imports the package in a fresh Python."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_importing_the_package_needs_no_torch_and_the_block_no_lightning(printed):
    assert printed[:2] == ["set() True", "set()"]


@pytest.mark.slow
def test_importing_the_package_changes_nothing_outside_of_it(printed):
    """The name of the Strategy is known after `import scmoe.lightning`; the class needs no name."""
    name = "ExpertParallelStrategy"
    assert printed[2:] == ["True", "True", "{'expert_parallel'}", name, name]


# -------------------------------------------------- the examples of README and docs/


def test_the_lines_of_the_readme_run():
    (lines,) = re.findall(
        r"```python\n(import scmoe.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    names = {"x": torch.randn(1, 4, 256), "task_loss": lambda y: y.square().mean()}
    exec(lines, names)  # the page's own text
    assert names["loss"].requires_grad and names["y"].shape == (1, 4, 256)


def example(name: str, **variables: str) -> str:
    """Return what the script prints."""
    script = str(ROOT / "docs/examples" / name)
    code, out, err = python(script, cwd=ROOT, env=environment(**variables), timeout_s=120)
    assert code == 0, err
    return out


@pytest.mark.ranks
def test_the_example_of_plain_torch_learns():
    assert re.fullmatch(r"loss after 20 steps: 0\.0\d\d\n", example("drop_in.py"))


@pytest.mark.ranks
def test_the_example_of_torchrun_learns_on_both_ranks():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(example, "two_ranks.py", RANK=rank, LOCAL_RANK=rank, **common)
            for rank in "01"
        ]
        assert all(re.search(r"step 19: loss 0\.0", rank.result()) for rank in ranks)


def test_biases_of_a_bare_module_and_of_nested_ones_move_by_their_own_load():
    torch.manual_seed(0)
    first, last = (scmoe.MoE(16, 4, 1, router="deepseek") for _ in range(2))
    (_, of_first), (_, of_last) = (moe(torch.randn(2, 8, 16)) for moe in (first, last))
    assert of_first.counts_E.tolist() != of_last.counts_E.tolist()

    scmoe.move_biases(first, [of_first])
    moved = first.router.bias.weight.clone()
    assert moved.any()

    nn.init.zeros_(first.router.bias.weight)
    scmoe.move_biases(nn.Sequential(nn.Sequential(first), last), [of_first, of_last])
    assert torch.equal(first.router.bias.weight, moved)


def test_modules_with_other_routers_and_other_experts_have_the_mean_of_their_losses():
    torch.manual_seed(0)
    modules = nn.ModuleList(
        [scmoe.MoE(16, 4, 2), scmoe.MoE(16, 4, 2, router="deepseek"), scmoe.MoE(16, 8, 2)]
    )
    stats = [moe(torch.randn(2, 8, 16))[1] for moe in modules]
    alone = torch.stack([scmoe.load_balance_loss([of_module]) for of_module in stats])
    torch.testing.assert_close(scmoe.load_balance_loss(stats), alone.mean())
    scmoe.move_biases(modules, stats)
    assert modules[1].router.bias.weight.any()


def test_two_gates_of_one_expert_are_refused():
    with pytest.raises(ValueError, match="num_experts is 1, allowed"):
        scmoe.ScMoEBlock(16, 2, num_experts=1, top_k=1, shortcut="dgmoe")


def test_a_single_token_has_the_output_that_it_has_in_a_batch():
    moe, x_D = scmoe.MoE(16, 4, 2), torch.randn(16)
    y_D, stats = moe(x_D)
    assert torch.equal(y_D, moe(x_D[None])[0][0]) and int(stats.num_tokens) == 1
