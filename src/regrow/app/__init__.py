"""Floor 7: command line, data, models, training loop and pictures: an optional extra, ``pip install regrow[app]``."""
