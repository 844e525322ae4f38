"""Evaluation suites, a module each (`suite.py` says what one is), and outputs side by side (`compare.py`)."""
