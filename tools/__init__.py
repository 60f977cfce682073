"""Development tools that no user installs. Run them from the clone's root: `python -m tools.compile_matrix`."""
