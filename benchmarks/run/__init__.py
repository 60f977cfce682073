"""One row, the process that measures it, a whole run."""
