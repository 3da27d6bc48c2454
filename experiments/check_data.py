"""`scmoe check-data` reads all data of a config."""

import sys
from dataclasses import replace

from scmoe.config.leaves import ConfigError
from scmoe.experiments.engine.command_line import KeyValue, call


def main(config: str, /, *overrides: KeyValue) -> None:
    """Read all data of a config, and name each file that cannot be read. No training is started.

    Exit code 2: a file cannot be read, or the data cannot be used at all.

    Args:
        config: a YAML file, or the name of a shipped one
        overrides: key=value, such as data.path=FOLDER
    """
    from scmoe.config.load import load
    from scmoe.training.assembly.data import build_datamodule, prepare_data

    settings = load(config, overrides)
    data = build_datamodule(replace(settings, data=replace(settings.data, on_error="skip")))  # it notes each file
    prepare_data(data)
    found = data.unreadable()
    for line in found:
        print(line)
    if found:
        raise ConfigError(f"{len(found)} files cannot be read, allowed: repair or remove them, or data.on_error=skip")
    print(f"all data of {settings.data.name} can be read")


if __name__ == "__main__":
    sys.exit(call("check-data", *sys.argv[1:]))
