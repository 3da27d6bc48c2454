"""The only place that uses undocumented names of Lightning. torch's: parallel/torch_seam.py.

Each function says what it gives. An upgrade can rename or change any of these names without notice,
so tests/test_private_names.py checks each one and refuses its use elsewhere. `trainer` is
always a Lightning Trainer, `plugin` a precision plugin.

    loops          how far the Trainer is, and what DDP and precision plugins do in a step
    launch         how ranks are started and which signals Lightning hears
    saves          when ModelCheckpoint saves, and what it keeps
    progress_bar   a bar without epochs
"""
