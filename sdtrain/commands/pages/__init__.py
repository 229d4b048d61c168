"""Commands that make pages to look at: the report of a run, and comparisons."""
