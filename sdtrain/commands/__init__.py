"""What each command of `sdtrain` does, one file per command."""
