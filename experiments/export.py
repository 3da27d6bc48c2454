"""Write the model of a run's last or best checkpoint as one file or as a Hugging Face folder, whatever its ranks."""

import sys
from pathlib import Path

from scmoe.config.leaves import ConfigError
from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> None:
    options = parser("export", __doc__)
    options.add_argument("run", type=Path, help="a run's directory, such as runs/latest")
    options.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint (default: last)")
    options.add_argument("--format", choices=["safetensors", "hf"], default="safetensors", help="one file, or a folder")
    options.add_argument(
        "--out", type=Path, help="default: RUN/export/model.safetensors, with config.yaml; RUN/export/hf"
    )
    options.add_argument("overrides", nargs="*", metavar="extensions=[...]", help="modules that the run's model needs")
    given = options.parse_intermixed_args(arguments)
    from scmoe.config.load import to_yaml
    from scmoe.parallel.checkpoint.export import consolidate
    from scmoe.training.build.data import tokenizer_of
    from scmoe.training.build.model import build_model_on_meta
    from scmoe.training.hf.folder import write_folder
    from scmoe.training.init_from.settings import model_settings
    from scmoe.training.run.resume import config_of, find_checkpoint

    run_dir = given.run.resolve()
    out = given.out or run_dir / "export" / ("hf" if given.format == "hf" else "model.safetensors")
    try:
        checkpoint = find_checkpoint(run_dir, given.which)
        config = config_of(run_dir, checkpoint, given.overrides)
        if given.format == "hf":
            kind = write_folder(checkpoint, out, config, tokenizer_of(config))
            print(f"{out}, model_type {kind}, from the {given.which} checkpoint, {checkpoint.name}")
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        consolidate(checkpoint, out, build_model_on_meta(config), model_settings(config))
        beside = out.parent / "config.yaml"
        if beside.resolve() != run_dir / "config.yaml":
            beside.write_text(to_yaml(config))
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    print(f"{out}, from the {given.which} checkpoint, {checkpoint.name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
