"""Commands of the project, each run as `python experiments/NAME.py`."""
