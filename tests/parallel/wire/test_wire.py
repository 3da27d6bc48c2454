"""A copy of a wire is the same wire."""

import pickle
from copy import deepcopy
from dataclasses import replace

import torch

from scmoe.parallel.mesh import Mesh
from scmoe.parallel.wire.wire import Wire


def test_a_copy_is_the_same_wire_and_a_pickle_holds_the_place_alone():
    wire = Wire(Mesh(3, 4, 2, ep_group=lambda: "no pickle can hold it"))
    module = torch.nn.Linear(1, 1)
    module.wire = wire
    assert deepcopy(module).wire is wire
    read = pickle.loads(pickle.dumps(wire))
    assert read.mesh == Mesh(3, 4, 2) and read.even is not wire.even


def test_another_mesh_leaves_the_check_of_rows_as_it_is():
    """Weights may be split after dispatchers were made."""
    wire = Wire(Mesh(3, 4, 2))
    split = replace(wire, mesh=replace(wire.mesh, dense_mesh="dense"))
    assert split.even is wire.even
