"""The real train step compiled for a machine that is not here."""
