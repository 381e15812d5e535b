from tests.builders import one_thread  # noqa: F401  (a fixture)
