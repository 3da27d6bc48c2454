"""Shows the progress of a training in the terminal."""

from scmoe.parallel.lightning_seam import TitledProgressBar


class StepProgressBar(TitledProgressBar):
    """A training is one long epoch of steps here, so the bar shows no epoch."""

    title = "training"
