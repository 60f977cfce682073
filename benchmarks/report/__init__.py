"""What a run shows: screen, pictures, comparisons, the results page."""
