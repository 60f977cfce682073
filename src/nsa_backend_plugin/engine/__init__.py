"""Everything that imports SGLang: backends, hooks, launch checks, the out-of-tree CPU platform."""
