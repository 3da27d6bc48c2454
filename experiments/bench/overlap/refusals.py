"""What a bench of blocks refuses before it measures: sizes, rows, loads and machines."""

import torch

from experiments.bench.pairs import ROWS
from experiments.bench.setting import Setting
from experiments.bench.stacks import block_config, rows_of_layout
from experiments.bench.two_batches import refuse_halves
from scmoe.config.leaves import ConfigError
from scmoe.loads import BALANCED, Sizes, check_load, load_of, rank_sequences


def refuse_impossible(setting: Setting) -> None:
    """Raise ConfigError for the first option of `bench overlap` that cannot be honoured."""
    if setting.device == "cuda":
        refuse_on_gpu(setting)
    elif setting.ranks < 2:
        raise ConfigError(
            f"--ranks is {setting.ranks}, allowed: 2 or more, as one rank sends nothing"
        )

    known = ROWS[setting.every]
    for row in setting.rows:
        if row not in known:
            names = " | ".join(known)
            raise ConfigError(f"--rows has {row}, allowed with --every {setting.every}: {names}")

    if setting.layers % setting.every:
        raise ConfigError(
            f"--layers is {setting.layers}, allowed: multiples of --every ({setting.every})"
        )
    for block in dict.fromkeys(["top2", *map(setting.block_of, setting.rows)]):
        block_config(block, setting)  # it refuses sizes that the block cannot have
    if setting.tokens % setting.seq_len:
        raise ConfigError(
            f"--tokens is {setting.tokens}, allowed: multiples of --seq-len ({setting.seq_len})"
        )
    if setting.num_experts % setting.ranks:
        raise ConfigError(
            f"--num-experts is {setting.num_experts}, allowed: multiples of --ranks"
            f" ({setting.ranks})"
        )
    rows_of_layout(setting)
    refuse_loads(setting)


def refuse_on_gpu(setting: Setting) -> None:
    """Raise ConfigError for what one GPU cannot measure, or if there is none."""
    if setting.link_mbit is not None:
        raise ConfigError(
            "--link-mbit belongs to links, and one GPU has none: its rows go over its bus"
        )
    if setting.ranks != 1:
        raise ConfigError(f"--ranks is {setting.ranks}, allowed with --device cuda: 1")
    if setting.compute != "real":
        raise ConfigError(
            "--compute is emulated, but a host that sleeps keeps no GPU busy. Leave it out with"
            " --device cuda"
        )
    if not torch.cuda.is_available():
        raise ConfigError("--device is cuda, and there is no CUDA device here")
    if setting.loads or setting.layout:
        raise ConfigError(
            "--load and --layout belong to links: rows over the bus of one GPU have equal numbers"
        )


def refuse_loads(setting: Setting) -> None:
    """Raise ConfigError for a load that cannot be dealt to every row."""
    blocks = dict.fromkeys(["top2", *map(setting.block_of, setting.rows)])
    for load in map(load_of, (BALANCED, *setting.loads)):
        for block in blocks:
            sizes = Sizes(setting.num_experts, setting.top_k_of(block), setting.ranks)
            check_load(load, sizes, setting.sequences)
        fewest_sequences = min(rank_sequences(load, setting.sequences, setting.ranks))
        refuse_halves(setting.rows, fewest_sequences)
        if load.kind == "ragged" and setting.layout not in (None, "dropless"):
            raise ConfigError(
                f"--layout is {setting.layout}, allowed with --load {load.name}: dropless"
            )
