"""`python -m scmoe VERB ...` is the command `scmoe VERB ...`."""

from scmoe.experiments.engine.command_line import main

if __name__ == "__main__":
    main()
