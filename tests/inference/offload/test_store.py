"""A store is a safetensors file of the experts."""

import pytest
import torch
from safetensors import safe_open

from scmoe.inference.offload.store import expert_layers, write_store
from tests.support.offloading import stored

pytestmark = pytest.mark.inference


def test_a_store_is_a_safetensors_file_of_the_experts_and_the_same_when_it_is_written_again(
    tmp_path,
):
    model, path = stored("architecture=top_k", tmp_path, torch.bfloat16)
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(found) == 3 * 6 * 2
    for layer, experts in expert_layers(model).items():
        for e in experts.expert_ids:
            assert torch.equal(found[f"{layer}.{e}.w_in_DF"], experts.w_in_eDF[e])
            assert torch.equal(found[f"{layer}.{e}.w_out_FD"], experts.w_out_eFD[e])
    before = path.read_bytes()
    write_store(path, model)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
