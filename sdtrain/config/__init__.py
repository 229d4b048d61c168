"""Settings: declared, read and written; no torch here, so that `sdtrain check` is quick."""
