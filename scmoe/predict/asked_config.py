"""The config of a job that `scmoe advise` judges, read once.

The batch of a step is that of the config, data.global_batch_size, over all ranks. A preset says
none: a rank then has TOKENS_OF_A_RANK tokens or IMAGES_OF_A_RANK images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scmoe.config.fields import Config
from scmoe.config.load import find, keys_of, keys_of_file, read_unchecked
from scmoe.config.registry import IMAGES

# of a rank in one step, where a preset of configs/model says no batch
TOKENS_OF_A_RANK = 16_384
IMAGES_OF_A_RANK = 128  # Table 9: 1,024 on eight ranks


@dataclass(frozen=True)
class AskedConfig:
    """source: where the values are from, for messages. values: combinations are not checked.
    typed: the keys on the command line. has_batch: False for a preset without one."""

    source: str
    values: Config
    typed: frozenset[str]
    has_batch: bool

    def with_accumulate(self, batches: int) -> "AskedConfig":
        """Return the config with trainer.accumulate as if from the command line."""
        trainer = replace(self.values.trainer, accumulate=batches)
        values = replace(self.values, trainer=trainer)
        return replace(self, values=values, typed=self.typed | {"trainer.accumulate"})

    @property
    def usual_samples(self) -> int:
        """Those of a rank in one step, where the config says no batch."""
        data = self.values.data
        if data.name in IMAGES or self.values.model.family == "swin":
            return IMAGES_OF_A_RANK
        return max(1, TOKENS_OF_A_RANK // data.seq_len)


def read_asked(name: str | Path, overrides: Sequence[str] = ()) -> AskedConfig:
    """Read a config, by a file or a name, and overrides. ConfigError: as `load_config`, but for
    combinations of values."""
    path = find(name)
    values = read_unchecked(path, overrides)
    typed = keys_of(overrides)
    is_preset = path.resolve().parent.parts[-2:] == ("configs", "model")
    has_batch = not is_preset or "data.global_batch_size" in typed | keys_of_file(path)
    return AskedConfig(f"{path} and command line", values, typed, has_batch)
