from pathlib import Path
from typing import Literal

from scmoe.command_line import KeyValue
from scmoe.config.leaves import ConfigError


def main(
    run: Path,
    /,
    *overrides: KeyValue,
    which: Literal["last", "best"] = "last",
    format: Literal["safetensors", "hf"] = "safetensors",
    out: Path | None = None,
) -> None:
    """Write the model of a run's last or best checkpoint as one file or as a Hugging Face folder,
    whatever its ranks.

    Args:
        run: a run's directory, such as runs/latest
        overrides: extensions=[...], modules that the run's model needs
        which: checkpoint
        format: one file, or a folder
        out: default: RUN/export/model.safetensors, with config.yaml; RUN/export/hf
    """
    from scmoe.training.run.directory import refuse_without_checkpoint

    run_dir = run.resolve()
    refuse_without_checkpoint(run_dir, which)
    from scmoe.config.as_yaml import to_yaml
    from scmoe.config.registry import named
    from scmoe.parallel.checkpoint.export import EXPORT, consolidate
    from scmoe.runs.seen import SeenRun
    from scmoe.training.assembly.data import kept_tokenizer, prepared_tokenizer
    from scmoe.training.assembly.model import build_model_on_meta
    from scmoe.training.run.resume import checkpoint_config, find_checkpoint, refuse_other_model
    from scmoe.weights.hf_folder import write_folder
    from scmoe.weights.pretrained import model_settings

    out = out or run_dir / "export" / ("hf" if format == "hf" else "model.safetensors")
    if format == "safetensors" and out.suffix != EXPORT:
        raise ConfigError(
            f"--out is {str(out)!r}, but only a file that ends in {EXPORT} can be loaded again"
        )
    try:
        checkpoint = find_checkpoint(run_dir, which)
        config = checkpoint_config(checkpoint, overrides)
        refuse_other_model(config, checkpoint_config(checkpoint, named(overrides)), checkpoint)
        if format == "hf":
            of_data = prepared_tokenizer(config, checkpoint)
            metrics = SeenRun(run_dir).metrics
            kind = write_folder(
                checkpoint, out, config, build_model_on_meta(config), of_data, metrics=metrics
            )
            print(f"{out}, model_type {kind}, from the {which} checkpoint, {checkpoint.name}")
            return
        beside = out.parent / "config.yaml"
        of_run = beside.resolve() == run_dir / "config.yaml"
        others = [file for file in out.parent.glob("[!.]*.safetensors") if file != out]
        used = beside.exists() and (others or not out.exists())
        if not of_run and used and beside.read_text(encoding="utf-8") != to_yaml(config):
            raise ConfigError(
                f"--out is {str(out)!r}, whose folder has another config.yaml. Give another folder"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = kept_tokenizer(checkpoint)
        consolidate(
            checkpoint,
            out,
            build_model_on_meta(config),
            model_settings(config),
            tokenizer=tokenizer,
        )
        if not of_run:  # how the run began
            beside.write_text(to_yaml(config), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    print(f"{out}, from the {which} checkpoint, {checkpoint.name}")
