"""The store: a safetensors file that holds the routed experts of one model (section A.3).

    length    of the header, 8 bytes
    header    JSON: <layer>.<e>.w_in_DF and .w_out_FD with dtype, shape and place; what identifies
              the model
    data      expert after expert, its two weights side by side, so that one read fetches one expert

A model is identified by the names, shapes and dtype of its experts and by a digest of all its other
weights. Opening a store compares them, and reads the whole file once to compare a digest of the
data: a store that is cut, changed, missing or of another model is refused before the first token.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from torch import Tensor, nn

from scmoe.files import index_entries, replacing, tensor_bytes, write_in_turn
from scmoe.moe.experts import Experts

FORMAT = "scmoe-experts-1"
PIECE = 1 << 22  # bytes of one read
Key = tuple[str, int]  # name of an Experts module in the model, expert
Read = Callable[[str], Tensor]  # return a parameter by its name


class StoreError(ValueError):
    """A store cannot be used, or an expert cannot be read from it; the message names the file."""


class Store:
    """An open store. Close it to release its file.

    model: has the weights that the store was written with, apart from the experts', which may be on
    the meta device.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        layers = expert_layers(model)
        self.path = path
        self.shapes = {
            name: (experts.w_in_eDF.shape[1:], experts.w_out_eFD.shape[1:])
            for name, experts in layers.items()
        }
        self.dtype = next(iter(layers.values())).w_in_eDF.dtype
        try:
            self.file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be opened: {error.strerror}. write_store writes a model's store."
            ) from error
        try:
            self.places = self._verified(model, layers)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
        self.file = -1

    def num_bytes(self, key: Key) -> int:
        return self.places[key][1] - self.places[key][0]

    def read_into(
        self, key: Key, slot: Tensor, after_piece: Callable[[int], None] = lambda done: None
    ) -> None:
        """Read an expert into the first bytes of `slot` (uint8, on the host).

        after_piece: called with the number of bytes read so far. Raises StoreError if the file ends
        early, OSError if it cannot be read.
        """
        begin, end = self.places[key]
        target = slot.numpy().data[: end - begin]
        done = 0
        while done < len(target):
            read = os.preadv(self.file, [target[done : done + PIECE]], begin + done)
            if read == 0:
                raise StoreError(f"{self.path} ends at byte {begin + done} of {end}")
            done += read
            after_piece(done)

    def weights(self, key: Key, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Return w_in_DF and w_out_FD as views of a slot that the expert was read into."""
        in_shape, out_shape = self.shapes[key[0]]
        split = in_shape.numel()
        all_N = slot[: self.num_bytes(key)].view(self.dtype)
        return all_N[:split].view(in_shape), all_N[split:].view(out_shape)

    def _verified(
        self, model: nn.Module, layers: Mapping[str, Experts]
    ) -> dict[Key, tuple[int, int]]:
        """Return the first byte of each expert and the one after its last.

        Raises StoreError unless the whole file is as it was written for this model.
        """
        path = self.path
        size = os.fstat(self.file).st_size
        length = int.from_bytes(os.pread(self.file, 8, 0), "little")
        try:
            tensors = json.loads(os.pread(self.file, min(length, size), 8))
            metadata = tensors.pop("__metadata__")
            kind, owner, content = (metadata[name] for name in ("format", "model", "content"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is no store of experts, or its header is damaged") from error

        if kind != FORMAT:
            raise StoreError(f"{path} has the format {kind}, allowed: {FORMAT}")
        wanted = index_entries(_shapes(layers))
        names = sorted(wanted.keys() | tensors.keys())
        differing = [name for name in names if wanted.get(name) != tensors.get(name)]
        if differing:
            name = differing[0]
            in_model = wanted.get(name, "absent")
            in_store = tensors.get(name, "absent")
            raise StoreError(
                f"{path} holds another model's experts: {name} is {in_store} in the store and"
                f" {in_model} in the model"
            )
        if owner != digest_of_rest(model):
            raise StoreError(f"{path} belongs to a model with other weights")

        ends = {name: entry["data_offsets"][1] for name, entry in wanted.items()}
        expected = 8 + length + max(ends.values(), default=0)
        if size != expected:
            raise StoreError(
                f"{path} has {size} bytes, and {expected} were written: it is cut, or something was"
                " added"
            )

        with open(self.file, "rb", closefd=False) as file:
            file.seek(8 + length)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != content:
            raise StoreError(f"{path} is damaged: its content is not what was written")

        first = {name: 8 + length + entry["data_offsets"][0] for name, entry in wanted.items()}
        return {
            (layer, e): (first[f"{layer}.{e}.w_in_DF"], 8 + length + ends[f"{layer}.{e}.w_out_FD"])
            for layer, experts in layers.items()
            for e in experts.expert_ids
        }


def write_store(path: Path, model: nn.Module, read: Read | None = None) -> None:
    """Write the experts of a model into a store. The file is complete or absent.

    model: gives names and shapes. If `read` is None it gives the weights too, else it may be on the
    meta device. One layer's experts are in memory at a time. They are read twice: for the digest,
    and for the file.
    """
    if read is None:
        read = dict(model.named_parameters()).__getitem__
    shapes = _shapes(expert_layers(model))
    stack = lru_cache(maxsize=2)(read)  # the two weights of one layer

    def expert(name: str) -> Tensor:
        layer, e, weight = name.rsplit(".", 2)
        stacked = "w_in_eDF" if weight == "w_in_DF" else "w_out_eFD"
        return stack(f"{layer}.{stacked}")[int(e)].to(shapes[name].dtype)

    content = hashlib.sha256()
    for name in shapes:
        content.update(tensor_bytes(expert(name)))
    header = {
        "format": FORMAT,
        "model": digest_of_rest(model, read),
        "content": content.hexdigest(),
    }
    with replacing(path) as partial:
        write_in_turn(shapes, expert, partial, header)


def expert_layers(model: nn.Module) -> dict[str, Experts]:
    """Return the Experts modules of a model by name.

    Raises ValueError if the model has none, or only a rank's share of them.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    if not layers:
        raise ValueError("The model has no routed experts that are not offloaded yet.")
    for name, experts in layers.items():
        if len(experts.expert_ids) < experts.num_experts:
            raise ValueError(
                f"{name} holds experts {experts.expert_ids} of {experts.num_experts}. A store needs"
                " a model with all experts, on one rank."
            )
    return layers


def digest_of_rest(model: nn.Module, read: Read | None = None) -> str:
    """Return a digest of the names and bytes of all parameters that are no routed expert's."""
    inside = tuple(f"{layer}." for layer in expert_layers(model))
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not name.startswith(inside):
            digest.update(name.encode())
            digest.update(tensor_bytes(p if read is None else read(name).to(p.dtype)))
    return digest.hexdigest()


def _shapes(layers: Mapping[str, Experts]) -> dict[str, Tensor]:
    """Return each weight's shape and dtype by its name in the store, in the order of the data."""
    shapes = dict[str, Tensor]()
    for layer, experts in layers.items():
        for e in experts.expert_ids:
            shapes[f"{layer}.{e}.w_in_DF"] = experts.w_in_eDF[0]
            shapes[f"{layer}.{e}.w_out_FD"] = experts.w_out_eFD[0]
    return shapes
