"""Settings: declared, read, written. No torch here, so that `sdtrain check` is quick."""
