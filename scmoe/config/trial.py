"""What trainer.fast_dev_run means: a trial that goes through every stage of a run in seconds."""

from dataclasses import replace

from scmoe.config.fields import Config


def shortened(config: Config) -> Config:
    """Return the configuration of the trial where fast_dev_run is set, otherwise the configuration as it is.

    One optimizer step and one batch of validation. The only logger is metrics.csv, and the only checkpoint is that of
    the end.
    """
    if not config.trainer.fast_dev_run:
        return config
    trainer = replace(config.trainer, max_steps=1, log_every=1, limit_train_batches=None, limit_val_batches=1)
    trainer = replace(trainer, save_top_k=0, early_stopping=None, profile_steps=None)
    return replace(config, trainer=trainer, logger=replace(config.logger, mode="disabled", tensorboard=False))
