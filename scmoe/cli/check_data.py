from dataclasses import replace
from pathlib import Path

from scmoe.command_line import KeyValue
from scmoe.config.leaves import ConfigError


def main(config: str, /, *overrides: KeyValue) -> None:
    """Read all data of a config, and name each file that cannot be read. No training is started.

    Exit code 2: a file cannot be read, unless data.on_error=skip; or the data cannot be used at
    all.

    Args:
        config: a YAML file, or the name of a shipped one
        overrides: key=value, such as data.path=FOLDER
    """
    from scmoe.config.load import load_config

    settings = load_config(config, overrides)
    data_path = settings.data.path
    if settings.data.name in ("text", "image_folder") and not Path(data_path or "").exists():
        raise ConfigError(
            f"data.path is {data_path}, which does not exist. Give a file or a folder."
        )
    from scmoe.training.assembly.data import build_datamodule, prepare_data

    # every bad file is noted; with an error the reading would end at the first one
    data = build_datamodule(replace(settings, data=replace(settings.data, on_error="skip")))
    prepare_data(data, warn=False)
    unreadable = data.unreadable()
    name = settings.data.name
    for line in unreadable:
        print(line)
    if not unreadable:
        print(f"all data of {name} can be read")
    elif settings.data.on_error == "skip":
        print(
            f"{len(unreadable)} file(s) cannot be read and will be skipped; all other data of"
            f" {name} can be read"
        )
    else:
        raise ConfigError(
            f"{len(unreadable)} file(s) cannot be read. Repair or remove them;"
            " data.on_error=skip trains without them."
        )
