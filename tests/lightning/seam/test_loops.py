"""Lightning's loops can run without inference mode."""

from lightning.pytorch import Trainer

from scmoe.lightning.seam.loops import without_inference_mode


def test_loops_that_only_compute_outputs_can_run_without_inference_mode():
    trainer = Trainer(accelerator="cpu", logger=False)
    loops = [trainer.validate_loop, trainer.test_loop, trainer.predict_loop]
    assert all(loop.inference_mode for loop in loops)
    without_inference_mode(trainer)
    assert not any(loop.inference_mode for loop in [*loops, trainer.fit_loop.epoch_loop.val_loop])
