"""Recorded routings: the experts of the tokens of some training steps, and the file of them.

A safetensors file, or a folder of such files, each with some of the steps:

    steps       int64 [S]    optimizer steps from 0, ascending
    layer_<i>   [S, T, K]    expert ids of MoE layer i, the router's first choice first, before any
                             copy is dropped, in the smallest type that holds num_experts, which is
                             the id of copies for which nothing is sent: those of padding tokens
                             and those to zero experts
    metadata    num_experts, num_ranks

T are the tokens of one batch on all ranks, in the order of ranks: the first T / num_ranks are those
of rank 0. Of a step that accumulates several batches, it is the first. In DGMoE, K is 2: the expert
of the preceding layer's representation, then that of the current one. T and K may differ between
layers, as between the stages of SwinV2.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmoe.files import write_in_turn


class Recorded(NamedTuple):
    """Recorded routings of S optimizer steps. ids: of each MoE layer, int64 [S, T, K]."""

    steps: list[int]
    ids: list[Tensor]
    num_experts: int
    num_ranks: int


def type_of(num_experts: int) -> torch.dtype:
    """Return the smallest integer type that holds num_experts itself, the id of a padding token."""
    return next(
        t for t in (torch.uint8, torch.int16, torch.int32) if num_experts <= torch.iinfo(t).max
    )


def write_routing(recorded: Recorded, path: Path) -> None:
    """Write one file. OSError: it cannot be written."""
    small = type_of(recorded.num_experts)
    tensors = {f"layer_{i}": ids_STK.to(small) for i, ids_STK in enumerate(recorded.ids)}
    tensors["steps"] = torch.tensor(recorded.steps)
    header = {"num_experts": str(recorded.num_experts), "num_ranks": str(recorded.num_ranks)}
    write_in_turn(tensors, tensors.__getitem__, path, header)


def read_routing(path: Path) -> Recorded:
    """Return what a file, or all files of a folder, have. ValueError: it is no recorded routing."""
    paths = sorted(path.glob("[!.]*.safetensors")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(
            f"{path} holds no recorded routing. Record one with analysis.record_routing=N."
        )
    files = [_read_file(file) for file in paths]
    first = files[0]
    for file, recorded in zip(paths, files, strict=True):
        if shape_of(recorded) != shape_of(first):
            raise ValueError(
                f"{file} has other layers, tokens, experts or ranks than {paths[0]}. Read it by"
                " itself."
            )
    steps = [step for recorded in files for step in recorded.steps]
    if sorted(set(steps)) != steps:
        raise ValueError(f"{path} has steps out of order, or twice: {steps}. Remove some files.")
    return first._replace(
        steps=steps, ids=[torch.cat(layer) for layer in zip(*(f.ids for f in files), strict=True)]
    )


def shape_of(recorded: Recorded) -> list[Any]:
    """Return what must be equal in the files of a folder: the numbers of experts and ranks, and T
    and K of each layer."""
    return [
        recorded.num_experts,
        recorded.num_ranks,
        *(ids_STK.shape[1:] for ids_STK in recorded.ids),
    ]


def _read_file(path: Path) -> Recorded:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            num_experts, num_ranks = int(header["num_experts"]), int(header["num_ranks"])
            steps = file.get_tensor("steps").tolist()
            num_layers = len({*file.keys()} - {"steps"})
            ids = [file.get_tensor(f"layer_{i}").long() for i in range(num_layers)]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a recorded routing: {error}. Record one with analysis.record_routing=N."
        ) from error
    for layer, ids_STK in enumerate(ids):
        in_range = bool(((ids_STK >= 0) & (ids_STK <= num_experts)).all())
        if ids_STK.dim() != 3 or len(ids_STK) != len(steps) or not in_range:
            raise ValueError(
                f"{path}, layer {layer}: expert ids must be [steps, tokens, choices], from 0 to"
                f" {num_experts}."
            )
    return Recorded(steps, ids, num_experts, num_ranks)
