"""Write the weights of a run's newest checkpoint as one file, whatever number of ranks the run had."""

import sys
from pathlib import Path

from experiments import command, parser
from scmoe.config.fields import ConfigError


@command
def main(arguments: list[str]) -> None:
    options = parser("export", __doc__)
    options.add_argument("run", type=Path, help="a run's directory, such as runs/latest")
    options.add_argument("--out", type=Path, help="default: RUN/export/model.safetensors; config.yaml goes beside it")
    given = options.parse_args(arguments)
    import shutil

    from scmoe.config.load import load
    from scmoe.parallel.checkpoint.durable import newest_good
    from scmoe.parallel.checkpoint.export import consolidate
    from scmoe.training.init_from.settings import model_settings

    run_dir = given.run.resolve()
    out = given.out or run_dir / "export" / "model.safetensors"
    try:
        settings = model_settings(load(run_dir / "config.yaml"))
        checkpoint = newest_good(run_dir / "checkpoints")
        out.parent.mkdir(parents=True, exist_ok=True)
        consolidate(checkpoint, out, settings)
        config = out.parent / "config.yaml"
        if config.resolve() != run_dir / "config.yaml":
            shutil.copyfile(run_dir / "config.yaml", config)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    print(f"{out}, from {checkpoint.name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
