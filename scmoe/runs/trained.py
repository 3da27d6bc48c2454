"""Loads a trained model into one process, from whatever holds it: a run, an exported file, a folder of Hugging Face."""

from pathlib import Path
from typing import Any

import torch

from scmoe.config.fields import Config
from scmoe.config.load import load_kept
from scmoe.init_from.pretrained import read_hf, stored_in
from scmoe.init_from.upcycle import fill
from scmoe.parallel.checkpoint.export import load_weights
from scmoe.parallel.checkpoint.loading import check_same_model, load_model
from scmoe.parallel.mesh import ParallelContext
from scmoe.runs.hf_config import OURS, dropless, our_config, read_config
from scmoe.training.assembly.model import build_model
from scmoe.training.run.resume import Which, config_of, find_checkpoint


def load_trained(path: str | Path, which: Which = "last") -> Any:
    """Return the whole model in eval mode, on the CPU. It is dropless: no token's output depends on other texts.

    path: a run's directory, a .safetensors file of `make export` with config.yaml beside it, or a folder with
    config.json. which: of a run, the last or the best checkpoint. ValueError: it is none of these, or is broken, or it
    was trained with extensions that the program has not imported.
    """
    path = Path(path)
    if (path / "config.json").exists():
        return load_folder(path)
    if path.suffix == ".safetensors":
        model = build(load_kept(path.parent / "config.yaml"))
        load_weights(path, model)
        return model
    if not (path / "checkpoints").is_dir():
        allowed = "the directory of a run, a .safetensors file of make export, a folder with config.json"
        raise ValueError(f"{path} holds no model, allowed: {allowed}")
    checkpoint = find_checkpoint(path, which)
    model = build(config_of(path, checkpoint))
    load_model(checkpoint, model, prefix="model.")
    return model


def build(config: Config) -> Any:
    return build_model(dropless(config), ParallelContext()).eval()


@torch.no_grad()
def load_folder(folder: Path) -> Any:
    """Return the model of a folder of Hugging Face's form, written by `make export` or by transformers."""
    content = read_config(folder)
    model = build(our_config(content, str(folder / "config.json")))
    if content["model_type"] != OURS:
        fill(model, read_hf(folder))
        return model
    stored = stored_in(sorted(folder.glob("*.safetensors")))
    theirs = {name.removeprefix("model."): tensor for name, tensor in stored.items() if name != "model.head.weight"}
    own = dict(model.named_parameters())
    theirs |= {"head.weight": stored["model.head.weight"]} if "head.weight" in own else {}
    check_same_model(folder, own, {name: tuple(tensor.on_meta.shape) for name, tensor in theirs.items()})
    for name, p in own.items():
        p.copy_(theirs[name].read())
    return model
