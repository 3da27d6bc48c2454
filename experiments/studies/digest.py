"""The digest of a config.

Runs of equal digest have equal results, so a table takes them. A sweep goes on only if its base config's is unchanged.
"""

import json
from hashlib import sha256

from scmoe.config.fields import Config
from scmoe.config.load import to_yaml
from scmoe.runs.seen import DEFAULTS, flat

# where a run is kept and how it is shown: nothing that changes a result
NOT_IN_DIGEST = ("name", "runs_dir", "logger.", "data.cache_dir", "trainer.progress", "trainer.max_memory_gib")


def digest_of(config: Config) -> str:
    """Return a hash of the values that can change a result. Defaults are left out: a new field changes no digest."""
    values = flat(to_yaml(config)).items()
    own = {key: value for key, value in values if value != DEFAULTS[key] and not key.startswith(NOT_IN_DIGEST)}
    return sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
