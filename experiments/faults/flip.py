"""One bit of a checkpoint changes: every reader must refuse it."""

import random
import tempfile
from pathlib import Path

from scmoe.experiments.engine.ranks import run_ranks
from scmoe.experiments.faults.tiny_run import LAST, OLD, WAYS, one_step, progress, save_marked, tiny
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import load_model
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.model import build_model


def write_old(rank: int, world_size: int, folder: Path, dense: str = "replicated") -> None:
    save_marked(one_step(world_size, folder, *WAYS[dense]), folder / "checkpoints" / LAST, OLD)


def flip(count: int, dense: str = "replicated") -> dict[str, int]:
    """refused: how often the reader raised and named the file. dense: where the dense weights of the run were."""
    with tempfile.TemporaryDirectory() as name:
        run_ranks(write_old, 2, Path(name), dense)
        path, draw, refused = Path(name) / "checkpoints" / LAST, random.Random(0), 0
        model = build_model(tiny(1), ParallelContext())
        load_model(path, model, "model.")
        files = sorted(path.iterdir())
        for _ in progress(range(count), "flipping"):
            file = draw.choice(files)
            whole = file.read_bytes()
            content = bytearray(whole)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            try:
                load_model(path, model, "model.")
            except durable.BrokenCheckpoint as error:
                refused += str(file) in str(error)
            file.write_bytes(whole)
        load_model(path, model, "model.")
    return {"flips": count, "refused": refused}
