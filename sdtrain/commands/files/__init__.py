"""The commands that make files of files: export, merge, extract, resize, info and cache."""
