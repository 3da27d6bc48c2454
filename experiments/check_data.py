"""Read all data of a config, and name each file that cannot be read. No training is started.

Exit code 2: a file cannot be read, or the data cannot be used at all.
"""

import sys
from pathlib import Path

from scmoe.config.leaves import ConfigError
from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> None:
    options = parser("check-data", __doc__)
    options.add_argument("config", type=Path, help="a YAML file")
    options.add_argument("overrides", metavar="key=value", nargs="*", help="overrides, such as data.path=FOLDER")
    given = options.parse_args(arguments)
    from scmoe.config.load import load
    from scmoe.training.build.data import build_datamodule, prepare_data

    config = load(given.config, [*given.overrides, "data.on_error=skip"])
    data = build_datamodule(config)
    prepare_data(data)
    found = data.unreadable()
    for line in found:
        print(line)
    if found:
        raise ConfigError(f"{len(found)} files cannot be read, allowed: mend or remove them, or data.on_error=skip")
    print(f"all data of {config.data.name} can be read")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
