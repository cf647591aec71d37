"""The card and the figure of `ders.py`, from its JSON alone."""
