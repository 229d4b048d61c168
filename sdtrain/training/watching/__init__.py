"""What a person sees of a run: the log, the progress line, previews, advice, the first and the last words."""
