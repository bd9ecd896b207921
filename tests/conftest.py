"""Property tests draw the same examples everywhere, so that a failure in CI fails at home too."""

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
