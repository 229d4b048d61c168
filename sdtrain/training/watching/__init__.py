"""What a person sees of a run: the log, the progress line, previews, advice, the banner and the summary."""
