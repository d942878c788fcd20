"""Property tests have no time limit per example: a loaded machine is no failure."""

from hypothesis import settings

settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
